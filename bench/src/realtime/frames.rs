//! The WebSocket frames of a client that is as cheap as can be: what a server sends is looked at where it lies, what a
//! client sends is masked with zeros. Knows only what servers here send: whole frames, no extensions.

use std::ops::Range;

pub const TEXT: u8 = 1;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// One frame in a buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub opcode: u8,
    pub payload: Range<usize>,
}

impl Frame {
    /// Of the frame that begins at `at`; none while it is not all there.
    pub fn at(buffer: &[u8], at: usize) -> Option<Frame> {
        let head = buffer.get(at..at + 2)?;
        let (opcode, short) = (head[0] & 0x0F, usize::from(head[1] & 0x7F));
        let (start, length) = match short {
            126 => (at + 4, usize::from(u16::from_be_bytes(buffer.get(at + 2..at + 4)?.try_into().ok()?))),
            127 => (at + 10, usize::try_from(u64::from_be_bytes(buffer.get(at + 2..at + 10)?.try_into().ok()?)).ok()?),
            length => (at + 2, length),
        };
        let payload = start..start.checked_add(length)?;
        (buffer.len() >= payload.end).then_some(Frame { opcode, payload })
    }
}

/// A whole frame from a client. Its mask is zero, so the payload stands as it is.
pub fn from_client(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        length @ 0..126 => frame.push(0x80 | length as u8),
        length @ 126..=0xFFFF => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(payload);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_one_after_the_other_and_only_when_they_are_whole() {
        let mut buffer = vec![0x81, 2, b'o', b'k', 0x81, 126, 1, 0];
        buffer.extend_from_slice(&[b'x'; 256]);
        assert_eq!(Frame::at(&buffer, 0), Some(Frame { opcode: TEXT, payload: 2..4 }));
        assert_eq!(Frame::at(&buffer, 4), Some(Frame { opcode: TEXT, payload: 8..264 }));
        assert_eq!(Frame::at(&buffer, 264), None);
        for cut in 0..4 {
            assert_eq!(Frame::at(&buffer[..cut], 0), None, "{cut} bytes");
        }
        assert_eq!(Frame::at(&buffer[..200], 4), None);
    }

    #[test]
    fn a_clients_frame_tells_its_length_and_that_it_is_masked() {
        for (length, head) in [(5, 2 + 4), (126, 4 + 4), (65_535, 4 + 4), (65_536, 10 + 4)] {
            let frame = from_client(TEXT, &vec![b'x'; length]);
            assert_eq!((frame.len(), frame[1] & 0x80), (head + length, 0x80), "{length} bytes");
        }
    }
}
