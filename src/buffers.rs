//! Memory for messages, used again once nobody reads them any more.
//!
//! New memory would have to be given by the system and filled with zeros, chunk by chunk, where the same few megabytes do.

use bytes::{Bytes, BytesMut};

/// What is used again by default, in bytes: what one receiver has asked for at a time, twice.
const BYTES_MAX: usize = 8 << 20;

/// Memory that was lent for messages, and comes back when the last one who reads such a message drops it.
#[derive(Debug)]
pub struct Buffers {
    /// What was lent last comes last.
    lent: Vec<Lent>,
    /// What they hold together.
    bytes: usize,
    bytes_max: usize,
}

#[derive(Debug)]
struct Lent {
    /// Begins where the memory does.
    handle: Bytes,
    /// How many bytes the memory has.
    room: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new(BYTES_MAX)
    }
}

impl Buffers {
    /// None yet. Memory beyond `bytes_max` is not used again.
    pub fn new(bytes_max: usize) -> Self {
        Self { lent: Vec::new(), bytes: 0, bytes_max }
    }

    /// So many bytes, of any value, to be [lent](Self::lend) when they are written.
    pub fn take(&mut self, length: usize) -> BytesMut {
        self.spare(length).unwrap_or_else(|| BytesMut::zeroed(length))
    }

    /// So many bytes, of any value, that were used before.
    pub fn spare(&mut self, length: usize) -> Option<BytesMut> {
        let mut buffer = self.returned(length)?;
        buffer.resize(length, 0);
        Some(buffer)
    }

    /// Lends what was written: its memory is used again when the result and all clones of it are dropped.
    pub fn lend(&mut self, buffer: BytesMut) -> Bytes {
        let room = buffer.capacity();
        let lent = buffer.freeze();
        self.note(room, || lent.clone());
        lent
    }

    /// Lends room for so many bytes, none of which is there yet.
    pub fn room(&mut self, length: usize) -> BytesMut {
        let mut buffer = self.returned(length).unwrap_or_else(|| BytesMut::with_capacity(length));
        buffer.clear();
        self.note(buffer.capacity(), || buffer.split_to(0).freeze());
        buffer
    }

    fn note(&mut self, room: usize, handle: impl FnOnce() -> Bytes) {
        if room <= self.bytes_max.saturating_sub(self.bytes) {
            self.bytes += room;
            self.lent.push(Lent { handle: handle(), room });
        }
    }

    /// Of the memory that is back, what was lent last: the processor may have it at hand. Memory that is too short is
    /// given up, for longer to take its place.
    fn returned(&mut self, length: usize) -> Option<BytesMut> {
        let at = self.lent.iter().rposition(|lent| lent.handle.is_unique())?;
        let Lent { handle, room } = self.lent.remove(at);
        self.bytes -= room;
        handle.try_into_mut().ok().filter(|buffer| buffer.capacity() >= length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lend(buffers: &mut Buffers, text: &str) -> Bytes {
        let mut buffer = buffers.take(text.len());
        buffer.copy_from_slice(text.as_bytes());
        buffers.lend(buffer)
    }

    /// Reads `text` in as much room, as it comes.
    fn read(buffers: &mut Buffers, text: &str) -> BytesMut {
        let mut buffer = buffers.room(text.len());
        let place = buffer.as_ptr();
        text.bytes().for_each(|byte| buffer.extend_from_slice(&[byte]));
        assert_eq!(buffer.as_ptr(), place, "there was no room");
        buffer
    }

    #[test]
    fn a_buffer_is_used_again_once_nobody_reads_it_and_never_before() {
        let mut buffers = Buffers::new(100);
        let (first, second) = (lend(&mut buffers, "first"), lend(&mut buffers, "second"));
        let place = first.as_ptr();
        let reader = first.slice(2..);
        drop(first);
        let third = lend(&mut buffers, "third");
        assert_eq!((&reader[..], &second[..], &third[..]), (&b"rst"[..], &b"second"[..], &b"third"[..]));
        drop(reader);
        let fourth = lend(&mut buffers, "4th");
        assert_eq!((&fourth[..], fourth.as_ptr()), (&b"4th"[..], place));
        assert_eq!((&second[..], &third[..]), (&b"second"[..], &b"third"[..]));
    }

    #[test]
    fn room_is_used_again_when_all_that_was_read_into_it_is_dropped() {
        let mut buffers = Buffers::new(100);
        let mut first = read(&mut buffers, "head:payload");
        let place = first.as_ptr();
        let payload = first.split_to(12).freeze().slice(5..);
        drop(first);
        let other = read(&mut buffers, "another one");
        assert_ne!(other.as_ptr(), place);
        assert_eq!(payload, &b"payload"[..]);
        drop(payload);
        assert_eq!(read(&mut buffers, "head:another").as_ptr(), place);
    }

    #[test]
    fn of_what_is_back_the_one_lent_last_is_taken_first_and_one_too_short_is_given_up() {
        let mut buffers = Buffers::new(100);
        let (long, short) = (lend(&mut buffers, "long enough"), lend(&mut buffers, "short"));
        let place = long.as_ptr();
        drop((long, short));
        assert_eq!(buffers.spare(8), None);
        assert_eq!(buffers.spare(8).map(|buffer| buffer.as_ptr()), Some(place));
        assert!(buffers.lent.is_empty());
    }

    #[test]
    fn what_is_kept_for_later_is_bounded_by_all_its_room() {
        let mut buffers = Buffers::new(25);
        let lent: Vec<_> = (0..5).map(|_| lend(&mut buffers, "ten bytes!")).collect();
        assert_eq!((buffers.lent.len(), buffers.bytes), (2, 20));
        drop(lent);
        // Short messages in long memory do not make it look short.
        let _short = [read(&mut buffers, "a"), read(&mut buffers, "b"), read(&mut buffers, "c")];
        assert!(buffers.bytes <= 25);
        assert!(buffers.bytes >= 20);
    }
}
