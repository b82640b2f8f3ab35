//! A client for server-sent events, as a browser's EventSource sees them. Plain HTTP only.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap};
use serde_json::Value;
use tokio::time::timeout;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SseEvent {
    /// The event's own id; not carried over from an earlier event.
    pub id: Option<String>,
    /// `message` where the server names none.
    pub event: String,
    pub data: String,
}

impl SseEvent {
    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.data).with_context(|| format!("data of event {:?} is no JSON: {}", self.event, self.data))
    }
}

/// Any answer, also a refusal: look at `status` first.
pub struct SseStream {
    status: u16,
    headers: HeaderMap,
    body: BoxStream<'static, reqwest::Result<Bytes>>,
    parser: Parser,
    ready: std::collections::VecDeque<SseEvent>,
}

impl SseStream {
    pub async fn open(url: &str, token: Option<&str>, last_event_id: Option<&str>) -> anyhow::Result<SseStream> {
        let mut request = reqwest::Client::new().get(url).header(ACCEPT, "text/event-stream");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(id) = last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        let answer = request.send().await.with_context(|| format!("opening {url}"))?;
        Ok(SseStream {
            status: answer.status().as_u16(),
            headers: answer.headers().clone(),
            body: answer.bytes_stream().boxed(),
            parser: Parser::default(),
            ready: Default::default(),
        })
    }

    pub fn status(&self) -> u16 {
        self.status
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The next event. Comments are skipped. The stream's end is an error.
    pub async fn next(&mut self, deadline: Duration) -> anyhow::Result<SseEvent> {
        let waited = timeout(deadline, self.read()).await;
        match waited.with_context(|| format!("no event within {deadline:?}"))?? {
            Some(event) => Ok(event),
            None => bail!("the event stream ended"),
        }
    }

    /// The first event that `wanted` accepts; those before it are dropped.
    pub async fn next_where(
        &mut self,
        mut wanted: impl FnMut(&SseEvent) -> bool,
        deadline: Duration,
    ) -> anyhow::Result<SseEvent> {
        let find = async {
            while let Some(event) = self.read().await? {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            bail!("the event stream ended before the wanted event")
        };
        timeout(deadline, find).await.with_context(|| format!("the wanted event did not come within {deadline:?}"))?
    }

    /// Waits for the server to end the stream, and says what came before that.
    pub async fn until_end(&mut self, deadline: Duration) -> anyhow::Result<Vec<SseEvent>> {
        let drain = async {
            let mut events = Vec::new();
            while let Some(event) = self.read().await? {
                events.push(event);
            }
            Ok(events)
        };
        timeout(deadline, drain).await.with_context(|| format!("the stream did not end within {deadline:?}"))?
    }

    /// The body of a refusal.
    pub async fn text(mut self, deadline: Duration) -> anyhow::Result<String> {
        let read = async {
            let mut text = Vec::new();
            while let Some(chunk) = self.body.next().await {
                text.extend_from_slice(&chunk?);
            }
            anyhow::Ok(String::from_utf8(text)?)
        };
        timeout(deadline, read).await.context("the body did not end in time")?
    }

    async fn read(&mut self) -> anyhow::Result<Option<SseEvent>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            match self.body.next().await {
                Some(chunk) => self.ready.extend(self.parser.push(&chunk.context("reading the event stream")?)),
                None => return Ok(None),
            }
        }
    }
}

/// Lines to events. Keeps what is incomplete, down to half a character.
#[derive(Debug, Default)]
struct Parser {
    rest: Vec<u8>,
    id: Option<String>,
    event: Option<String>,
    data: Vec<String>,
}

impl Parser {
    fn push(&mut self, chunk: &[u8]) -> Vec<SseEvent> {
        self.rest.extend_from_slice(chunk);
        let mut events = Vec::new();
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        // Taken out at once: a chunk may hold thousands of lines.
        let incomplete = self.rest.split_off(whole);
        let lines = std::mem::replace(&mut self.rest, incomplete);
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(line);
            events.extend(self.line(line.trim_end_matches(['\r', '\n'])));
        }
        events
    }

    fn line(&mut self, line: &str) -> Option<SseEvent> {
        if line.is_empty() {
            return self.dispatch();
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
        match field {
            "id" => self.id = Some(value),
            "event" => self.event = Some(value),
            "data" => self.data.push(value),
            // Comments have an empty field name; the standard ignores what it does not know.
            _ => {}
        }
        None
    }

    /// A block without data is no event, but its fields are used up.
    fn dispatch(&mut self) -> Option<SseEvent> {
        let (id, event, data) = (self.id.take(), self.event.take(), std::mem::take(&mut self.data));
        (!data.is_empty()).then(|| SseEvent { id, event: event.unwrap_or_else(|| "message".to_owned()), data: data.join("\n") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: Option<&str>, event: &str, data: &str) -> SseEvent {
        SseEvent { id: id.map(str::to_owned), event: event.to_owned(), data: data.to_owned() }
    }

    #[test]
    fn events_are_read_however_the_network_cuts_them() {
        let text = "retry: 100\n\n: heartbeat\n\nid: e/0/1/0\nevent: change\ndata: {\"n\":\"ä\"}\n\ndata:a\r\ndata: b\r\n\r\ndata: unfinished";
        let wanted = [event(Some("e/0/1/0"), "change", "{\"n\":\"ä\"}"), event(None, "message", "a\nb")];
        for size in [1, 2, 7, text.len()] {
            let mut parser = Parser::default();
            let found: Vec<_> = text.as_bytes().chunks(size).flat_map(|chunk| parser.push(chunk)).collect();
            assert_eq!(found, wanted, "chunks of {size}");
        }
    }
}
