//! Frames as RFC 6455 has them, from the server's side: whole, unmasked, made once and shared by everybody who gets them.
//!
//! Only what is sent; what clients send is read by a library.

use bytes::{BufMut, Bytes, BytesMut};

const FINAL_TEXT: u8 = 0x81;
const FINAL_CLOSE: u8 = 0x88;
const FINAL_PING: u8 = 0x89;

/// A control frame's payload is at most so long.
const CONTROL_BYTES: usize = 125;

/// `payload` is JSON of this crate, so it is UTF-8.
pub fn text(payload: &[u8]) -> Bytes {
    frame(FINAL_TEXT, payload)
}

/// `reason` is cut where it is too long.
pub fn close(code: u16, reason: &str) -> Bytes {
    let mut end = reason.len().min(CONTROL_BYTES - 2);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut payload = code.to_be_bytes().to_vec();
    payload.extend_from_slice(&reason.as_bytes()[..end]);
    frame(FINAL_CLOSE, &payload)
}

/// The client answers with the same eight bytes.
pub fn ping(payload: [u8; 8]) -> Bytes {
    frame(FINAL_PING, &payload)
}

fn frame(first: u8, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(payload.len() + 10);
    out.put_u8(first);
    match payload.len() {
        short @ ..126 => out.put_u8(short as u8),
        medium @ ..65_536 => {
            out.put_u8(126);
            out.put_u16(medium as u16);
        }
        long => {
            out.put_u8(127);
            out.put_u64(long as u64);
        }
    }
    out.put_slice(payload);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_three_forms() {
        assert_eq!(&text(b"hi")[..], b"\x81\x02hi");
        assert_eq!(&text(&[b'x'; 126])[..5], b"\x81\x7e\x00\x7ex");
        assert_eq!(&text(&[b'x'; 65_536])[..11], b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00x");
    }

    #[test]
    fn a_close_says_code_and_reason_and_stays_a_control_frame() {
        assert_eq!(&close(1013, "slow")[..], b"\x88\x06\x03\xf5slow");
        let long = close(1012, &"ä".repeat(100));
        assert_eq!(long.len(), 2 + 2 + 122);
        assert!(std::str::from_utf8(&long[4..]).is_ok());
        assert_eq!(&ping(*b"12345678")[..], b"\x89\x0812345678");
    }
}
