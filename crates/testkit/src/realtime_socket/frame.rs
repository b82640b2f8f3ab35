//! One frame of the realtime wire, written down from the protocol and not from our server's
//! encoder, so that a mistake there does not hide itself.

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

/// Which framing the socket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vsn {
    /// JSON objects.
    V1,
    /// JSON arrays, and binary frames.
    V2,
}

impl Vsn {
    pub fn as_str(self) -> &'static str {
        match self {
            Vsn::V1 => "1.0.0",
            Vsn::V2 => "2.0.0",
        }
    }
}

/// A binary broadcast looks as it does to a stock client, `{"type", "event", "payload", "meta"?}`;
/// where its content is not JSON, `payload` is `{"bytes": […]}`.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    pub join_ref: Option<String>,
    pub reference: Option<String>,
    pub topic: String,
    pub event: String,
    pub payload: Value,
}

impl Frame {
    pub(super) fn encode(&self, vsn: Vsn) -> String {
        let Frame { join_ref, reference, topic, event, payload } = self;
        match vsn {
            Vsn::V1 => {
                json!({ "topic": topic, "event": event, "payload": payload, "ref": reference, "join_ref": join_ref }).to_string()
            }
            Vsn::V2 => json!([join_ref, reference, topic, event, payload]).to_string(),
        }
    }

    pub(super) fn decode_text(text: &str, vsn: Vsn) -> anyhow::Result<Frame> {
        let value: Value = serde_json::from_str(text).with_context(|| format!("the server sent no JSON: {text}"))?;
        let (join_ref, reference, topic, event, payload) = match vsn {
            Vsn::V1 => {
                ensure!(value.is_object(), "a frame of vsn 1 is an object, not {text}");
                (&value["join_ref"], &value["ref"], &value["topic"], &value["event"], &value["payload"])
            }
            Vsn::V2 => {
                ensure!(value.as_array().is_some_and(|parts| parts.len() == 5), "a frame of vsn 2 has five parts, not {text}");
                (&value[0], &value[1], &value[2], &value[3], &value[4])
            }
        };
        Ok(Frame {
            join_ref: join_ref.as_str().map(str::to_owned),
            reference: reference.as_str().map(str::to_owned),
            topic: topic.as_str().with_context(|| format!("no topic in {text}"))?.to_owned(),
            event: event.as_str().with_context(|| format!("no event in {text}"))?.to_owned(),
            payload: payload.clone(),
        })
    }

    /// The kinds that a server sends: push 0, reply 1, broadcast 2, user broadcast 4.
    pub(super) fn decode_binary(bytes: &[u8]) -> anyhow::Result<Frame> {
        let mut reader = Reader { rest: bytes };
        match reader.byte()? {
            0 => {
                let [join_ref, topic, event] = reader.strings()?;
                Ok(Frame { join_ref: Some(join_ref), reference: None, topic, event, payload: bytes_value(reader.rest) })
            }
            1 => {
                let [join_ref, reference, topic, status] = reader.strings()?;
                let payload = json!({ "status": status, "response": bytes_value(reader.rest) });
                Ok(Frame { join_ref: Some(join_ref), reference: Some(reference), topic, event: "phx_reply".to_owned(), payload })
            }
            2 => {
                let [topic, event] = reader.strings()?;
                Ok(Frame { join_ref: None, reference: None, topic, event, payload: bytes_value(reader.rest) })
            }
            4 => user_broadcast(reader),
            kind => bail!("the server sent a binary frame of kind {kind}, which no client reads"),
        }
    }
}

fn user_broadcast(mut reader: Reader<'_>) -> anyhow::Result<Frame> {
    let lengths = [reader.byte()?, reader.byte()?, reader.byte()?];
    let encoding = reader.byte()?;
    let [topic, event, meta] = reader.strings_of(lengths)?;
    let content = match encoding {
        0 => bytes_value(reader.rest),
        1 => serde_json::from_slice(reader.rest).context("a broadcast that says it is JSON is none")?,
        other => bail!("a broadcast has the unknown encoding {other}"),
    };
    let mut payload = json!({ "type": "broadcast", "event": event, "payload": content });
    if !meta.is_empty() {
        payload["meta"] = serde_json::from_str(&meta).context("the metadata of a broadcast are no JSON")?;
    }
    Ok(Frame { join_ref: None, reference: None, topic, event: "broadcast".to_owned(), payload })
}

fn bytes_value(bytes: &[u8]) -> Value {
    json!({ "bytes": bytes })
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn byte(&mut self) -> anyhow::Result<u8> {
        let (first, rest) = self.rest.split_first().context("a binary frame is too short")?;
        self.rest = rest;
        Ok(*first)
    }

    /// N lengths, then N strings.
    fn strings<const N: usize>(&mut self) -> anyhow::Result<[String; N]> {
        let mut lengths = [0; N];
        for length in &mut lengths {
            *length = self.byte()?;
        }
        self.strings_of(lengths)
    }

    fn strings_of<const N: usize>(&mut self, lengths: [u8; N]) -> anyhow::Result<[String; N]> {
        let mut strings = [const { String::new() }; N];
        for (string, length) in strings.iter_mut().zip(lengths) {
            let (head, rest) = self.rest.split_at_checked(usize::from(length)).context("a binary frame is too short")?;
            *string = std::str::from_utf8(head).context("a binary frame's header is not UTF-8")?.to_owned();
            self.rest = rest;
        }
        Ok(strings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_frames_are_read_as_they_are_written() {
        let frame = Frame {
            join_ref: Some("1".to_owned()),
            reference: Some("2".to_owned()),
            topic: "realtime:a".to_owned(),
            event: "phx_join".to_owned(),
            payload: json!({"config": {}}),
        };
        for vsn in [Vsn::V1, Vsn::V2] {
            assert_eq!(Frame::decode_text(&frame.encode(vsn), vsn).unwrap(), frame);
        }
        assert_eq!(frame.encode(Vsn::V2), r#"["1","2","realtime:a","phx_join",{"config":{}}]"#);
        assert!(Frame::decode_text(&frame.encode(Vsn::V1), Vsn::V2).is_err());
    }

    #[test]
    fn a_binary_broadcast_looks_as_it_does_to_a_stock_client() {
        let bytes = |meta: &str, encoding: u8, content: &[u8]| {
            let mut frame = vec![4, 1, 2, meta.len() as u8, encoding];
            frame.extend_from_slice(format!("tev{meta}").as_bytes());
            frame.extend_from_slice(content);
            Frame::decode_binary(&frame).map(|frame| (frame.topic, frame.event, frame.payload))
        };
        let check = |found: anyhow::Result<(String, String, Value)>, payload: Value| {
            assert_eq!(found.unwrap(), ("t".to_owned(), "broadcast".to_owned(), payload));
        };
        check(bytes("", 1, b"{\"a\":1}"), json!({"type": "broadcast", "event": "ev", "payload": {"a": 1}}));
        check(
            bytes("{\"id\":7}", 0, &[1, 255]),
            json!({"type": "broadcast", "event": "ev", "payload": {"bytes": [1, 255]}, "meta": {"id": 7}}),
        );
        assert!(bytes("", 9, b"").is_err() && Frame::decode_binary(&[4, 9, 9]).is_err() && Frame::decode_binary(&[]).is_err());
    }
}
