//! What both ends of an MQTT connection do with packets, beside encoding and parsing them: messages with weights are read
//! into memory that is used again, and written from where they lie.

use std::io;
use std::mem;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::buffers::Buffers;

/// Room made for a read when no length is known yet, and for short packets.
const READ_BYTES: usize = 8 << 10;

/// A packet's length has seven bits in each of its bytes; this one says that another byte follows.
const CONTINUES: u8 = 0x80;

/// What came through a connection and was not taken yet: the beginning of a packet, or several packets.
#[derive(Debug, Default)]
pub struct Received {
    /// Whole packets are split off its front.
    pub bytes: BytesMut,
    /// Whether the buffer they lie in was lent for one long packet.
    is_lent: bool,
}

impl Received {
    /// Reads what is there of the next packet, which lacks `missing` bytes at least, or, if that is short, of several.
    /// Returns how many bytes were read; 0: there will be no more.
    ///
    /// With a long packet's length known it gets a buffer of its own, of `buffers`, and nothing else is read into that.
    pub async fn read(
        &mut self,
        socket: &mut (impl AsyncRead + Unpin),
        missing: usize,
        buffers: &Mutex<Buffers>,
    ) -> io::Result<usize> {
        let length = self.bytes.len() + missing;
        let is_taken = self.is_lent && self.bytes.is_empty();
        if is_taken || self.bytes.capacity() < length {
            self.make_room(length, buffers);
        }
        let room = if self.is_lent { missing } else { self.bytes.capacity() - self.bytes.len() };
        socket.read_buf(&mut (&mut self.bytes).limit(room)).await
    }

    fn make_room(&mut self, length: usize, buffers: &Mutex<Buffers>) {
        let was_lent = mem::replace(&mut self.is_lent, length > READ_BYTES);
        let roomy = match (was_lent, self.is_lent) {
            (_, true) => buffers.lock().unwrap_or_else(PoisonError::into_inner).room(length),
            (true, false) => BytesMut::with_capacity(READ_BYTES),
            (false, false) => return self.bytes.reserve(READ_BYTES),
        };
        let before = mem::replace(&mut self.bytes, roomy);
        self.bytes.extend_from_slice(&before);
    }
}

/// All of a PUBLISH but its payload, which so need not be copied behind it.
#[derive(Debug)]
pub struct PublishHead {
    /// The packet's type and flags.
    kind: u8,
    /// The topic, and above QoS 0 the packet's id.
    variable: BytesMut,
}

impl PublishHead {
    /// Of an encoded PUBLISH that has no payload.
    pub fn of(mut bare: BytesMut) -> Self {
        let kind = bare.get_u8();
        while bare.get_u8() & CONTINUES != 0 {}
        Self { kind, variable: bare }
    }

    /// The packet's id, if it has one.
    pub fn id(&self) -> Option<u16> {
        let has_id = self.kind & 0b0110 != 0;
        self.variable.last_chunk().filter(|_| has_id).map(|id| u16::from_be_bytes(*id))
    }

    /// Writes the head of a packet with a payload of so many bytes.
    pub fn write(&self, payload_bytes: usize, bytes: &mut BytesMut) {
        bytes.put_u8(self.kind);
        let mut length = self.variable.len() + payload_bytes;
        while length >= CONTINUES.into() {
            bytes.put_u8(length as u8 | CONTINUES);
            length /= usize::from(CONTINUES);
        }
        bytes.put_u8(length as u8);
        bytes.extend_from_slice(&self.variable);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    /// A packet of a byte that says what it is, four that say how long the rest is, and the rest.
    fn packet(kind: u8, length: usize) -> Vec<u8> {
        let length_bytes = u32::try_from(length).unwrap().to_be_bytes();
        [&[kind][..], &length_bytes, &vec![kind; length]].concat()
    }

    /// Splits a whole packet off, or says how many bytes it lacks.
    fn take(received: &mut Received) -> Result<BytesMut, usize> {
        let Some(length) = received.bytes.get(1..5) else { return Err(5 - received.bytes.len()) };
        let length = 5 + u32::from_be_bytes(length.try_into().unwrap()) as usize;
        match length.checked_sub(received.bytes.len()) {
            None | Some(0) => Ok(received.bytes.split_to(length)),
            Some(missing) => Err(missing),
        }
    }

    async fn next(
        received: &mut Received,
        socket: &mut (impl AsyncRead + Unpin),
        buffers: &Mutex<Buffers>,
    ) -> BytesMut {
        loop {
            match take(received) {
                Ok(packet) => return packet,
                Err(missing) => assert_ne!(received.read(socket, missing, buffers).await.unwrap(), 0),
            }
        }
    }

    #[tokio::test]
    async fn packets_of_any_length_come_whole_however_few_bytes_are_read_at_a_time() {
        let lengths = [0, 1, READ_BYTES - 6, READ_BYTES - 5, READ_BYTES - 4, 3 * READ_BYTES, 2, 2 * READ_BYTES, 0, 100];
        let packets: Vec<_> = (0..).zip(lengths).map(|(kind, length)| packet(kind, length)).collect();
        for at_a_time in [1, 3, 1000, 1 << 20] {
            let (mut sender, mut socket) = duplex(at_a_time);
            let buffers = Mutex::default();
            let mut received = Received::default();
            let sending = async { sender.write_all(&packets.concat()).await.unwrap() };
            let receiving = async {
                for packet in &packets {
                    assert_eq!(next(&mut received, &mut socket, &buffers).await, packet);
                }
            };
            tokio::join!(sending, receiving);
            drop(sender);
            assert_eq!(received.read(&mut socket, 5, &buffers).await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn long_packets_are_read_into_the_memory_of_those_that_were_dropped() {
        let (mut sender, mut socket) = duplex(1 << 20);
        let buffers = Mutex::default();
        let mut received = Received::default();
        let mut kept = None;
        let mut places = Vec::new();
        for kind in 0..4 {
            sender.write_all(&[packet(kind, 5 * READ_BYTES), packet(kind, 0)].concat()).await.unwrap();
            let long = next(&mut received, &mut socket, &buffers).await;
            next(&mut received, &mut socket, &buffers).await;
            places.push(long.as_ptr());
            if kind == 1 {
                kept = Some(long.freeze());
            }
        }
        assert_eq!(places[0], places[1]);
        assert_ne!(places[1], places[2]);
        assert_eq!(places[2], places[3]);
        assert_eq!(kept.unwrap(), packet(1, 5 * READ_BYTES));
    }

    #[test]
    fn the_head_of_a_publish_tells_the_length_of_the_payload_behind_it() {
        for (kind, id) in [(0x30, None), (0x3b, Some(0x6364))] {
            let bare = [&[kind, 4][..], b"abcd"].concat();
            let head = PublishHead::of(bare[..].into());
            assert_eq!(head.id(), id);
            for (payload_bytes, length) in [
                (0, &[4][..]),
                (123, &[127]),
                (124, &[0x80, 1]),
                (16_379, &[0xff, 0x7f]),
                (16_380, &[0x80, 0x80, 1]),
                (268_435_451, &[0xff, 0xff, 0xff, 0x7f]),
            ] {
                let mut bytes = BytesMut::new();
                head.write(payload_bytes, &mut bytes);
                assert_eq!(bytes, [&[kind][..], length, b"abcd"].concat());
                assert_eq!(PublishHead::of(bytes).variable, b"abcd"[..]);
            }
        }
    }
}
