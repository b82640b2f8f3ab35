//! A subscriber over WebSocket (either framing) or SSE, read up to a mark: a row of `marks` that everybody may see.

use anyhow::{Result, bail};
use serde_json::{Value, json};
use walcast_testkit::{RealtimeSocket, SseStream, Vsn};

use crate::support::DEADLINE;

pub enum Ear {
    Socket(Box<RealtimeSocket>),
    Stream(Box<SseStream>),
}

/// What came up to the mark.
#[derive(Debug, Default)]
pub struct Heard {
    pub changes: Vec<Value>,
    pub resyncs: Vec<String>,
}

pub const TOPIC: &str = "realtime:ward";

impl Ear {
    /// `tables` by name, or all of schema public if there are none.
    pub async fn socket(url: &str, token: &str, vsn: Vsn, tables: &[&str]) -> Result<Ear> {
        let mut socket = RealtimeSocket::connect(url, token, vsn).await?;
        let mut bindings: Vec<Value> =
            tables.iter().map(|table| json!({ "event": "*", "schema": "public", "table": table })).collect();
        if bindings.is_empty() {
            bindings.push(json!({ "event": "*", "schema": "public" }));
        }
        socket.join_ok(TOPIC, json!({ "postgres_changes": bindings }), Some(token)).await?;
        Ok(Ear::Socket(Box::new(socket)))
    }

    pub async fn stream(url: &str, token: &str) -> Result<Ear> {
        let mut stream = SseStream::open(&format!("{url}/sse/v1/changes?schema=public"), Some(token), None).await?;
        let first = stream.next(DEADLINE).await?;
        if first.event != "live" {
            bail!("the stream began with {first:?}");
        }
        Ok(Ear::Stream(Box::new(stream)))
    }

    pub async fn until_mark(&mut self, mark: i64) -> Result<Heard> {
        let mut heard = Heard::default();
        loop {
            let change = match self {
                Ear::Socket(socket) => {
                    let mut frame = socket.next_event(DEADLINE).await?;
                    match frame.event.as_str() {
                        "postgres_changes" => frame.payload["data"].take(),
                        "system" if frame.payload["status"] == "ok" => continue,
                        "system" => {
                            heard.resyncs.push(frame.payload["message"].to_string());
                            continue;
                        }
                        other => bail!("unexpected {other}: {}", frame.payload),
                    }
                }
                Ear::Stream(stream) => {
                    let event = stream.next(DEADLINE).await?;
                    match event.event.as_str() {
                        "change" => event.json()?,
                        "position" => continue,
                        "resync" => {
                            heard.resyncs.push(event.data);
                            continue;
                        }
                        other => bail!("unexpected event {other}: {}", event.data),
                    }
                }
            };
            if change["table"] != "marks" {
                heard.changes.push(change);
            } else if change["record"]["n"] == mark {
                return Ok(heard);
            }
        }
    }
}
