//! Topic names: the only place that knows them.

use crate::types::{PeerId, Round};

/// Where a message goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Topic {
    /// `init/<peer>`: hellos and goodbyes, retained, for all.
    Init(PeerId),
    /// `election/<round>/<candidate>`: ballots and evaluations; only the candidate subscribes.
    Election(Round, PeerId),
    /// `leader/<round>`: what the leader tells all.
    Leader(Round),
    /// `round/<round>/report/<leader>`: what members tell the leader.
    Report(Round, PeerId),
    /// `round/<round>/grant/<holder>`: which chunks a receiver asks of a holder.
    Grant(Round, PeerId),
    /// `round/<round>/weights/<receiver>`: chunks for one.
    Weights(Round, PeerId),
    /// `round/<round>/weights/all`: chunks for everyone who asked.
    WeightsAll(Round),
    /// `head`: the newest committed decree, retained.
    Head,
}

impl Topic {
    /// The only peer that subscribes, where it is one.
    pub fn subscriber(&self) -> Option<&PeerId> {
        match self {
            Topic::Election(_, peer) | Topic::Report(_, peer) | Topic::Grant(_, peer) | Topic::Weights(_, peer) => {
                Some(peer)
            }
            Topic::Init(_) | Topic::Leader(_) | Topic::WeightsAll(_) | Topic::Head => None,
        }
    }
}

/// The topics of one federation.
#[derive(Clone, Debug)]
pub struct Topics {
    root: String,
}

impl Topics {
    /// Topics under `<prefix>/<federation>/`.
    pub fn new(prefix: &str, federation: &str) -> Self {
        Self { root: format!("{prefix}/{federation}") }
    }

    /// The full name of a topic.
    pub fn name(&self, topic: &Topic) -> String {
        let root = &self.root;
        match topic {
            Topic::Init(peer) => format!("{root}/init/{peer}"),
            Topic::Election(round, candidate) => format!("{root}/election/{round}/{candidate}"),
            Topic::Leader(round) => format!("{root}/leader/{round}"),
            Topic::Report(round, leader) => format!("{root}/round/{round}/report/{leader}"),
            Topic::Grant(round, holder) => format!("{root}/round/{round}/grant/{holder}"),
            Topic::Weights(round, receiver) => format!("{root}/round/{round}/weights/{receiver}"),
            Topic::WeightsAll(round) => format!("{root}/round/{round}/weights/all"),
            Topic::Head => format!("{root}/head"),
        }
    }

    /// The filters through which `me` hears everything but chunks.
    ///
    /// A fixed set of wildcards for the whole life of a connection (rumqttd keeps a log per filter and never frees it),
    /// no two of which match one topic (rumqttd would deliver twice).
    pub fn control_filters(&self, me: &PeerId) -> Vec<String> {
        let root = &self.root;
        vec![
            format!("{root}/init/+"),
            format!("{root}/election/+/{me}"),
            format!("{root}/leader/+"),
            format!("{root}/round/+/report/{me}"),
            format!("{root}/round/+/grant/{me}"),
            format!("{root}/head"),
        ]
    }

    /// The topic on which `me` tries what a broker can do. No filter of a peer matches it.
    pub fn probe(&self, me: &PeerId) -> String {
        format!("{}/probe/{me}", self.root)
    }

    /// The filters through which `me` gets chunks.
    pub fn bulk_filters(&self, me: &PeerId) -> Vec<String> {
        let root = &self.root;
        vec![format!("{root}/round/+/weights/{me}"), format!("{root}/round/+/weights/all")]
    }
}

/// Whether an MQTT topic `filter` (with `+` and a last `#`) matches `topic`.
pub fn matches(filter: &str, topic: &str) -> bool {
    let (mut filter, mut topic) = (filter.split('/'), topic.split('/'));
    loop {
        match (filter.next(), topic.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(want), Some(level)) if want == level => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_topic_for_a_peer_matches_exactly_one_of_its_filters() {
        let (topics, me) = (Topics::new("lab/rodizio", "demo"), PeerId::new("a").unwrap());
        let round = Round(7);
        let mine = [
            Topic::Init(PeerId::new("b").unwrap()),
            Topic::Election(round, me.clone()),
            Topic::Leader(round),
            Topic::Report(round, me.clone()),
            Topic::Grant(round, me.clone()),
            Topic::Weights(round, me.clone()),
            Topic::WeightsAll(round),
            Topic::Head,
        ];
        let filters = [topics.control_filters(&me), topics.bulk_filters(&me)].concat();
        for topic in &mine {
            let name = topics.name(topic);
            assert_eq!(filters.iter().filter(|filter| matches(filter, &name)).count(), 1, "{name}");
            let other = PeerId::new("c").unwrap();
            let others = [topics.control_filters(&other), topics.bulk_filters(&other)].concat();
            let heard_by_all = others.iter().any(|filter| matches(filter, &name));
            assert_eq!(topic.subscriber(), (!heard_by_all).then_some(&me), "{name}");
        }
        let other = topics.name(&Topic::Report(round, PeerId::new("b").unwrap()));
        assert!(!filters.iter().any(|filter| matches(filter, &other)));
        assert!(!filters.iter().any(|filter| matches(filter, &topics.probe(&me))));
    }

    #[test]
    fn wildcards_match_as_mqtt_says() {
        assert!(matches("a/+/c", "a/b/c") && matches("a/#", "a/b/c") && matches("a/#", "a"));
        assert!(!matches("a/+", "a/b/c") && !matches("a/b", "a") && !matches("a", "a/b"));
    }
}
