//! Which brokers of a list are there at all, before one of them is talked to.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Broker, io_reason, no_answer};

/// How long a broker may take to accept a TCP connection in the first pass over a list: one round trip. A machine that is
/// switched off does not even refuse.
const ANSWER_MIN: Duration = Duration::from_secs(1);

/// How long it may take for one step of the handshake in the first pass: two round trips, of a line that delays by
/// 300 ms each way. Only a frozen broker takes a connection and then says nothing.
const STEP_MIN: Duration = Duration::from_secs(2);

/// How long either may take at most, in later passes and where there is no other broker to hurry for.
const LIMIT_MAX: Duration = Duration::from_secs(8);

/// How long brokers are waited for in one pass over the list. Each pass waits twice as long as the one before, so a slow
/// line gets in, with loss too, and the first pass loses little time where nobody is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Patience {
    pub(super) answer: Duration,
    pub(super) step: Duration,
}

impl Patience {
    /// Those of the `pass`-th attempt, from 0, at so many brokers.
    pub(super) fn of_pass(pass: u32, brokers: usize) -> Self {
        let factor = if brokers > 1 { 1 << pass.min(3) } else { 3 };
        Self { answer: (factor * ANSWER_MIN).min(LIMIT_MAX), step: (factor * STEP_MIN).min(LIMIT_MAX) }
    }
}

/// What came of asking all brokers of a list at once. Told in the order of the list, so that the best one that is there
/// is taken, and those that are not cost one limit together. Dropping it gives up the rest.
pub(super) struct Answers {
    asking: JoinSet<(usize, Result<(), String>)>,
    known: Vec<Option<Result<(), String>>>,
}

impl Answers {
    /// Asks. A broker that is the only one is talked to in any case.
    pub(super) fn ask(brokers: &[Broker], limit: Duration) -> Self {
        let mut asking = JoinSet::new();
        if brokers.len() < 2 {
            return Self { asking, known: vec![Some(Ok(())); brokers.len()] };
        }
        for (index, broker) in brokers.iter().cloned().enumerate() {
            asking.spawn(async move { (index, accepts(&broker, limit).await) });
        }
        Self { asking, known: vec![None; brokers.len()] }
    }

    /// Whether the broker at `index` is there; if not: why.
    pub(super) async fn of(&mut self, index: usize) -> Result<(), String> {
        loop {
            if let Some(answer) = self.known.get_mut(index).and_then(Option::take) {
                return answer;
            }
            match self.asking.join_next().await {
                Some(Ok((answered, answer))) => self.known[answered] = Some(answer),
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("not asked".to_owned()),
            }
        }
    }
}

async fn accepts(broker: &Broker, limit: Duration) -> Result<(), String> {
    match timeout(limit, TcpStream::connect(broker.to_string())).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(io_reason(&error)),
        Err(_) => Err(no_answer(limit)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::super::parse_broker;
    use super::*;

    #[test]
    fn a_slow_line_gets_the_time_it_takes_and_nobody_waits_long_at_first() {
        assert_eq!(Patience::of_pass(0, 2), Patience { answer: ANSWER_MIN, step: STEP_MIN });
        assert_eq!(Patience::of_pass(1, 2), Patience { answer: 2 * ANSWER_MIN, step: 2 * STEP_MIN });
        assert_eq!(Patience::of_pass(99, 2), Patience { answer: LIMIT_MAX, step: LIMIT_MAX });
        assert!(Patience::of_pass(0, 1).step > 2 * STEP_MIN);
    }

    #[tokio::test]
    async fn answers_come_in_the_order_of_the_list() {
        let deaf = TcpSocket::new_v4().unwrap();
        deaf.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [listener.local_addr().unwrap(), deaf.local_addr().unwrap(), listener.local_addr().unwrap()];
        let brokers = addresses.map(|addr| parse_broker(&addr.to_string()).unwrap());
        let mut answers = Answers::ask(&brokers, Duration::from_secs(30));
        assert_eq!(answers.of(2).await, Ok(()));
        assert_eq!(answers.of(1).await, Err("connection refused".to_owned()));
        assert_eq!(answers.of(0).await, Ok(()));
    }
}
