//! Messages that are longer than a broker takes go in pieces.
//!
//! A peer makes its chunks as short as its broker wants them. What cannot change any more are the chunks of a blob that
//! was announced before, at another broker or by another peer: a decree names them. Those, and control messages of
//! very many peers, are cut here and joined at the other end of the broker.
//!
//! The pieces of a message come one after another, since one connection publishes them to one topic. A message with a
//! missing piece is dropped, like any that is lost, and sent again by the protocol.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The first byte of a piece. Other messages begin with the protocol's version, which is not 0.
const PIECE: u8 = 0;

/// The bytes before a piece's own: [`PIECE`], the message's number, the piece's place, and how many there are.
const HEADER_BYTES: usize = 1 + 8 + 4 + 4;

/// Cuts a message into pieces that have `bytes_max` at most with their header; one that fits is left as it is.
pub(super) fn cut(message: Bytes, number: u64, bytes_max: usize) -> Vec<Bytes> {
    if message.len() <= bytes_max {
        return vec![message];
    }
    let length = bytes_max.saturating_sub(HEADER_BYTES).max(1);
    let count = message.len().div_ceil(length);
    let piece = |(index, part): (usize, &[u8])| {
        let mut piece = BytesMut::with_capacity(HEADER_BYTES + part.len());
        piece.put_u8(PIECE);
        piece.put_u64(number);
        // A message is far shorter than 4 GiB, so its pieces are fewer.
        piece.put_u32(u32::try_from(index).unwrap_or(u32::MAX));
        piece.put_u32(u32::try_from(count).unwrap_or(u32::MAX));
        piece.put_slice(part);
        piece.freeze()
    };
    message.chunks(length).enumerate().map(piece).collect()
}

/// Joins the pieces that come through one connection.
#[derive(Debug)]
pub(super) struct Joiner {
    /// Messages that lack pieces, the one that began first in front.
    open: VecDeque<Partial>,
    /// What the pieces of all of them may have in bytes.
    bytes_max: usize,
}

#[derive(Debug)]
struct Partial {
    number: u64,
    count: u32,
    /// How many pieces are here: the first ones.
    pieces: u32,
    joined: BytesMut,
}

impl Joiner {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { open: VecDeque::new(), bytes_max }
    }

    /// Takes what came; returns a message when it is whole.
    pub(super) fn take(&mut self, payload: Bytes) -> Option<Bytes> {
        if payload.first() != Some(&PIECE) {
            return Some(payload);
        }
        let mut piece = payload;
        if piece.len() <= HEADER_BYTES {
            return None;
        }
        piece.advance(1);
        let (number, index, count) = (piece.get_u64(), piece.get_u32(), piece.get_u32());
        let at = match self.open.iter().position(|open| open.number == number) {
            Some(at) => at,
            None if index == 0 => {
                self.open.push_back(Partial { number, count, pieces: 0, joined: BytesMut::new() });
                self.open.len() - 1
            }
            None => return None,
        };
        let open = &mut self.open[at];
        if index > open.pieces || count != open.count {
            self.open.remove(at);
            return None;
        }
        // At QoS 1 a piece may come twice.
        if index == open.pieces {
            open.joined.extend_from_slice(&piece);
            open.pieces += 1;
        }
        if open.pieces == open.count {
            return self.open.remove(at).map(|open| open.joined.freeze());
        }
        self.forget_oldest();
        None
    }

    /// Nobody can make a peer hold more than its limit.
    fn forget_oldest(&mut self) {
        let bytes = |open: &Partial| HEADER_BYTES + open.joined.len();
        let mut held: usize = self.open.iter().map(bytes).sum();
        while held > self.bytes_max
            && let Some(oldest) = self.open.pop_front()
        {
            held -= bytes(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> Bytes {
        (0..length).map(|n| (n % 251) as u8 + 1).collect::<Vec<_>>().into()
    }

    #[test]
    fn a_message_that_fits_is_left_as_it_is() {
        let message = message(100);
        assert_eq!(cut(message.clone(), 7, 100), std::slice::from_ref(&message));
        assert_eq!(Joiner::new(1000).take(message.clone()), Some(message));
    }

    #[test]
    fn pieces_are_short_enough_and_make_the_message_again() {
        let mut joiner = Joiner::new(10_000);
        for length in [101, 200, 1000, 4321] {
            let message = message(length);
            let pieces = cut(message.clone(), 7, 100);
            assert!(pieces.iter().all(|piece| piece.len() <= 100));
            let joined: Vec<_> = pieces.into_iter().filter_map(|piece| joiner.take(piece)).collect();
            assert_eq!(joined, [message]);
        }
    }

    #[test]
    fn the_pieces_of_several_senders_may_mix() {
        let mut joiner = Joiner::new(10_000);
        let (a, b) = (message(300), message(310));
        let (of_a, of_b) = (cut(a.clone(), 1, 100), cut(b.clone(), 2, 100));
        let mixed = of_a.into_iter().zip(of_b).flat_map(|(a, b)| [a, b]);
        let joined: Vec<_> = mixed.filter_map(|piece| joiner.take(piece)).collect();
        assert_eq!(joined, [a, b]);
    }

    #[test]
    fn a_message_with_a_missing_piece_is_dropped_and_one_that_comes_twice_is_not() {
        let mut joiner = Joiner::new(10_000);
        let message = message(300);
        let pieces = cut(message.clone(), 1, 100);
        for missing in 0..pieces.len() {
            let rest = pieces.iter().enumerate().filter(|(index, _)| *index != missing);
            assert!(rest.filter_map(|(_, piece)| joiner.take(piece.clone())).next().is_none());
            joiner.open.clear();
        }
        let twice = pieces.iter().flat_map(|piece| [piece, piece]);
        let joined: Vec<_> = twice.filter_map(|piece| joiner.take(piece.clone())).collect();
        assert_eq!(joined, [message]);
    }

    #[test]
    fn what_waits_for_its_last_piece_is_bounded() {
        let mut joiner = Joiner::new(1000);
        for number in 0..100 {
            assert_eq!(joiner.take(cut(message(300), number, 100).swap_remove(0)), None);
        }
        assert!(joiner.open.len() <= 10, "{} messages wait", joiner.open.len());
        assert_eq!(joiner.open.back().unwrap().number, 99);
    }

    #[test]
    fn what_looks_like_a_piece_and_is_none_is_dropped() {
        let mut joiner = Joiner::new(1000);
        for bytes in [vec![0], vec![0; HEADER_BYTES], vec![0; 40], [vec![0; 16], vec![0, 1]].concat()] {
            assert_eq!(joiner.take(bytes.into()), None);
        }
    }
}
