//! The frames of unmodified Supabase clients: Phoenix channels, serializer versions 1 and 2.
//!
//! Version 1 frames are objects, version 2 frames are arrays `[join_ref, ref, topic, event, payload]` and some are binary.
//! Called by the socket for each frame; never keeps state. Whatever cannot be read is an error with a reason.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::{Value, value::RawValue};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Vsn {
    V1,
    V2,
}

impl Vsn {
    /// The `vsn` query parameter; absent means 1, as in Phoenix.
    pub fn parse(text: Option<&str>) -> Result<Vsn, FrameError> {
        match text.map(|text| text.split('.').next().unwrap_or_default()) {
            None | Some("1") => Ok(Vsn::V1),
            Some("2") => Ok(Vsn::V2),
            Some(_) => Err(FrameError::Vsn(text.unwrap_or_default().chars().take(20).collect())),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("protocol version `{0}` is not spoken here; use vsn=1.0.0 or vsn=2.0.0")]
    Vsn(String),
    #[error("the frame is not JSON: {0}")]
    Json(String),
    #[error("the frame has the wrong form: {0}")]
    Form(&'static str),
    #[error("the binary frame ends after {0} bytes, in the middle of its {1}")]
    Short(usize, &'static str),
    #[error("binary frames of kind {0} are not sent by clients")]
    Kind(u8),
}

/// One frame from a client.
#[derive(Debug, Clone, PartialEq)]
pub struct Inbound {
    pub join_ref: Option<String>,
    pub reference: Option<String>,
    pub topic: String,
    pub event: String,
    pub payload: Value,
}

#[derive(Deserialize)]
struct ObjectFrame {
    topic: String,
    event: String,
    #[serde(default)]
    payload: Value,
    #[serde(default, rename = "ref")]
    reference: Option<RefValue>,
    #[serde(default)]
    join_ref: Option<RefValue>,
}

/// Clients count references as strings; some send numbers.
#[derive(Deserialize)]
#[serde(untagged)]
enum RefValue {
    Text(String),
    Number(serde_json::Number),
}

impl RefValue {
    fn text(self) -> String {
        match self {
            RefValue::Text(text) => text,
            RefValue::Number(number) => number.to_string(),
        }
    }
}

#[derive(Deserialize)]
struct ArrayFrame(Option<RefValue>, Option<RefValue>, String, String, #[serde(default)] Value);

impl Inbound {
    pub fn parse_text(vsn: Vsn, text: &str) -> Result<Inbound, FrameError> {
        let json = |error: serde_json::Error| FrameError::Json(error.to_string());
        match vsn {
            Vsn::V1 => {
                let frame: ObjectFrame = serde_json::from_str(text).map_err(json)?;
                Ok(Inbound {
                    join_ref: frame.join_ref.map(RefValue::text),
                    reference: frame.reference.map(RefValue::text),
                    topic: frame.topic,
                    event: frame.event,
                    payload: frame.payload,
                })
            }
            Vsn::V2 => {
                // Extra trailing elements are tolerated, so the five are taken one by one.
                let parts: Vec<&RawValue> = serde_json::from_str(text).map_err(json)?;
                let [join_ref, reference, topic, event, payload, ..] = parts.as_slice() else {
                    return Err(FrameError::Form("expected [join_ref, ref, topic, event, payload]"));
                };
                let joined = format!("[{join_ref},{reference},{topic},{event},{payload}]");
                let frame: ArrayFrame = serde_json::from_str(&joined).map_err(json)?;
                Ok(Inbound {
                    join_ref: frame.0.map(RefValue::text),
                    reference: frame.1.map(RefValue::text),
                    topic: frame.2,
                    event: frame.3,
                    payload: frame.4,
                })
            }
        }
    }

    /// Kind 0 (push) and kind 3 (user broadcast push) of version 2.
    pub fn parse_binary(frame: &[u8]) -> Result<Inbound, FrameError> {
        let mut reader = Reader { frame, at: 0 };
        match reader.byte("kind")? {
            0 => {
                let lengths = reader.lengths::<4>()?;
                let [join_ref, reference, topic, event] = reader.strings(lengths)?;
                let payload = serde_json::from_slice(reader.rest()).map_err(|error| FrameError::Json(error.to_string()))?;
                Ok(Inbound { join_ref: some(join_ref), reference: some(reference), topic, event, payload })
            }
            3 => {
                let lengths = reader.lengths::<5>()?;
                let encoding = reader.byte("encoding")?;
                let [join_ref, reference, topic, event, _metadata] = reader.strings(lengths)?;
                let data = match encoding {
                    1 => serde_json::from_slice(reader.rest()).map_err(|error| FrameError::Json(error.to_string()))?,
                    0 => Value::Null,
                    _ => return Err(FrameError::Form("the payload encoding is neither 0 (bytes) nor 1 (JSON)")),
                };
                let payload = serde_json::json!({ "type": "broadcast", "event": event, "payload": data });
                Ok(Inbound { join_ref: some(join_ref), reference: some(reference), topic, event: "broadcast".into(), payload })
            }
            kind => Err(FrameError::Kind(kind)),
        }
    }
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

struct Reader<'a> {
    frame: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn byte(&mut self, what: &'static str) -> Result<u8, FrameError> {
        let byte = *self.frame.get(self.at).ok_or(FrameError::Short(self.frame.len(), what))?;
        self.at += 1;
        Ok(byte)
    }

    fn lengths<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let mut lengths = [0; N];
        for length in &mut lengths {
            *length = self.byte("header")?;
        }
        Ok(lengths)
    }

    fn strings<const N: usize>(&mut self, lengths: [u8; N]) -> Result<[String; N], FrameError> {
        let mut strings = [const { String::new() }; N];
        for (string, length) in strings.iter_mut().zip(lengths) {
            let end = self.at + usize::from(length);
            let bytes = self.frame.get(self.at..end).ok_or(FrameError::Short(self.frame.len(), "header strings"))?;
            // supabase-js 2.109 writes one byte per UTF-16 unit where 2.119 writes UTF-8.
            *string = String::from_utf8(bytes.to_vec()).unwrap_or_else(|_| bytes.iter().map(|byte| char::from(*byte)).collect());
            self.at = end;
        }
        Ok(strings)
    }

    fn rest(&self) -> &'a [u8] {
        &self.frame[self.at..]
    }
}

/// Answers a client's frame.
pub fn reply(vsn: Vsn, to: &Inbound, status: &str, response: &Value) -> Bytes {
    let payload = serde_json::json!({ "status": status, "response": response }).to_string();
    frame(vsn, to.join_ref.as_deref(), to.reference.as_deref(), &to.topic, "phx_reply", payload.as_bytes())
}

/// A frame of the server's own; fan-out frames carry no references.
pub fn push(vsn: Vsn, topic: &str, event: &str, payload: &[u8]) -> Bytes {
    frame(vsn, None, None, topic, event, payload)
}

/// Ends the channel that was joined with `join_ref`: `phx_close` or `phx_error`.
pub fn end(vsn: Vsn, join_ref: Option<&str>, topic: &str, event: &str, payload: &Value) -> Bytes {
    frame(vsn, join_ref, join_ref, topic, event, payload.to_string().as_bytes())
}

/// `payload` is JSON already; it is copied once, behind its short head.
fn frame(vsn: Vsn, join_ref: Option<&str>, reference: Option<&str>, topic: &str, event: &str, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(payload.len() + topic.len() + event.len() + 64);
    match vsn {
        Vsn::V1 => {
            out.put_slice(b"{\"topic\":");
            put_string(&mut out, topic);
            out.put_slice(b",\"event\":");
            put_string(&mut out, event);
            out.put_slice(b",\"payload\":");
            out.put_slice(payload);
            out.put_slice(b",\"ref\":");
            put_option(&mut out, reference);
            out.put_slice(b"}");
        }
        Vsn::V2 => {
            out.put_slice(b"[");
            put_option(&mut out, join_ref);
            out.put_slice(b",");
            put_option(&mut out, reference);
            out.put_slice(b",");
            put_string(&mut out, topic);
            out.put_slice(b",");
            put_string(&mut out, event);
            out.put_slice(b",");
            out.put_slice(payload);
            out.put_slice(b"]");
        }
    }
    out.freeze()
}

fn put_option(out: &mut BytesMut, text: Option<&str>) {
    match text {
        Some(text) => put_string(out, text),
        None => out.put_slice(b"null"),
    }
}

fn put_string(out: &mut BytesMut, text: &str) {
    out.put_slice(Value::from(text).to_string().as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_join_of_supabase_js_is_read() {
        let text = r#"["6","7","realtime:room1","phx_join",{"config":{"private":false}},"extra"]"#;
        let frame = Inbound::parse_text(Vsn::V2, text).unwrap();
        assert_eq!((frame.join_ref.as_deref(), frame.reference.as_deref()), (Some("6"), Some("7")));
        assert_eq!((frame.topic.as_str(), frame.event.as_str()), ("realtime:room1", "phx_join"));
        assert_eq!(frame.payload["config"]["private"], json!(false));
    }

    #[test]
    fn a_python_heartbeat_has_a_null_ref() {
        let text = r#"{"event":"heartbeat","payload":{},"topic":"phoenix","ref":null,"join_ref":null}"#;
        let frame = Inbound::parse_text(Vsn::V1, text).unwrap();
        assert_eq!(frame.reference, None);
        let answer = reply(Vsn::V1, &frame, "ok", &json!({}));
        assert_eq!(&answer[..], br#"{"topic":"phoenix","event":"phx_reply","payload":{"status":"ok","response":{}},"ref":null}"#);
    }

    #[test]
    fn the_recorded_binary_broadcast_is_read() {
        let frame = b"\x03\x01\x01\x0e\x06\x00\x0167realtime:room1cursor{\"x\":1}";
        let read = Inbound::parse_binary(frame).unwrap();
        assert_eq!((read.topic.as_str(), read.event.as_str()), ("realtime:room1", "broadcast"));
        assert_eq!(read.payload, json!({"type": "broadcast", "event": "cursor", "payload": {"x": 1}}));
        let latin = b"\x03\x00\x00\x02\x01\x00\x00\xe9\xe5\xfc";
        assert_eq!(Inbound::parse_binary(latin).unwrap().topic, "éå");
    }

    #[test]
    fn broken_frames_say_what_is_wrong() {
        assert!(Inbound::parse_text(Vsn::V2, "{}").is_err());
        assert!(Inbound::parse_text(Vsn::V2, "[1,2]").unwrap_err().to_string().contains("expected [join_ref"));
        assert!(Inbound::parse_text(Vsn::V1, "[").is_err());
        for cut in 0..20 {
            let whole = b"\x03\x01\x01\x0e\x06\x00\x0167realtime:room1cursor{\"x\":1}";
            assert!(Inbound::parse_binary(&whole[..cut]).is_err(), "{cut}");
        }
        assert_eq!(Inbound::parse_binary(&[9]).unwrap_err(), FrameError::Kind(9));
        assert!(Vsn::parse(Some("3.0.0")).is_err());
    }

    #[test]
    fn pushes_have_null_references_and_escaped_names() {
        assert_eq!(&push(Vsn::V2, "realtime:a\"b", "system", b"{}")[..], br#"[null,null,"realtime:a\"b","system",{}]"#);
        assert_eq!(&push(Vsn::V1, "t", "e", b"1")[..], br#"{"topic":"t","event":"e","payload":1,"ref":null}"#);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64)) {
            let _ = Inbound::parse_binary(&bytes);
            let _ = Inbound::parse_text(Vsn::V2, &String::from_utf8_lossy(&bytes));
        }
    }
}
