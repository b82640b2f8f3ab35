//! Server-sent events: one event is `id`, `event`, `data`, and an empty line.

use bytes::{BufMut, Bytes, BytesMut};
use serde_json::{Value, json};
use walcast_model::Position;

/// `data` must hold no raw newline; JSON from this crate never does.
pub fn event(name: &str, id: Option<&Position>, data: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(data.len() + 64);
    if let Some(id) = id {
        out.put_slice(format!("id: {id}\n").as_bytes());
    }
    out.put_slice(format!("event: {name}\ndata: ").as_bytes());
    out.put_slice(data);
    out.put_slice(b"\n\n");
    out.freeze()
}

/// The first event of a stream, and every later `resync`.
pub fn opening(name: &str, position: &Position, reason: Option<&str>) -> Bytes {
    let mut data = json!({ "position": position.to_string() });
    if let Some(reason) = reason {
        data["reason"] = Value::from(reason);
    }
    event(name, Some(position), data.to_string().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_three_lines_and_a_blank() {
        let position: Position = "5f3a09c1/16/B374D848/3".parse().unwrap();
        assert_eq!(&event("change", Some(&position), b"{}")[..], b"id: 5f3a09c1/16/B374D848/3\nevent: change\ndata: {}\n\n");
        let opening = opening("resync", &position, Some("gone"));
        assert!(
            std::str::from_utf8(&opening).unwrap().contains(r#"data: {"position":"5f3a09c1/16/B374D848/3","reason":"gone"}"#)
        );
    }
}
