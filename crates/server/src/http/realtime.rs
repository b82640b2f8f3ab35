//! The WebSocket of unmodified Supabase clients: `/realtime/v1/websocket` and `/socket/websocket`.
//!
//! One task reads frames and keeps the channels, one writes what the outbox brings, many frames a write.
//! Every answer goes through the outbox, so order is the outbox's order. [`channel`] holds what a topic is.

mod channel;

use std::{collections::HashMap, sync::Arc, time::Duration};

use axum::{
    extract::{
        State,
        ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    },
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use serde_json::json;
use walcast_engine::{CloseReason, Outbox, OutboxReader, outbox};
use walcast_protocol::phoenix::{FrameError, Inbound, Vsn, push, reply};

use crate::http::{
    App,
    identity::query_parameter,
    limits::{ClientAddress, ConnectionPermit},
    realtime::channel::{Channel, Channels},
};

/// A client that sends nothing for so long has gone: stock clients beat every 25 s.
const IDLE: Duration = Duration::from_secs(60);
/// A write that takes longer meets a client that does not read.
const WRITE: Duration = Duration::from_secs(20);

pub async fn upgrade(
    State(app): State<App>,
    address: ClientAddress,
    uri: Uri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let key = headers.get("x-api-key").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let key = key.or_else(|| query_parameter(&uri, "apikey")).unwrap_or_default();
    let claims = match app.engine.verify(&key) {
        Ok(claims) => claims,
        Err(error) => return upstream_error(StatusCode::UNAUTHORIZED, &error.to_string()),
    };
    let vsn = match Vsn::parse(query_parameter(&uri, "vsn").as_deref()) {
        Ok(vsn) => vsn,
        Err(error) => return upstream_error(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade,
        Err(rejection) => {
            let mut response = upstream_error(StatusCode::UPGRADE_REQUIRED, &rejection.body_text());
            response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            return response;
        }
    };
    let permit = match app.admit(address, &claims) {
        Ok(permit) => permit,
        Err(refusal) => return refusal.upgrade_response(),
    };
    upgrade
        // The default buffer of 128 KiB would be most of what an idle connection costs.
        .read_buffer_size(4096)
        .max_message_size(app.limits.max_frame_bytes)
        .max_frame_size(app.limits.max_frame_bytes)
        .on_upgrade(move |socket| run(app, socket, vsn, key, permit))
}

/// Upstream's shape, which clients show.
fn upstream_error(status: StatusCode, error: &str) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], json!({ "error": error }).to_string()).into_response()
}

async fn run(app: App, socket: WebSocket, vsn: Vsn, key: String, permit: ConnectionPermit) {
    let (sink, stream) = socket.split();
    let (outbox, reader) = outbox(app.limits.outbox_bytes);
    let mut writer = tokio::spawn(write(sink, reader, permit.clone()));
    let socket = Socket { channels: Channels::new(app.limits.max_topics), app, vsn, key, outbox, permit: permit.clone() };
    tokio::select! {
        () = socket.read(stream) => {}
        // The writer ends only with the connection; it has said what there was to say.
        _ = &mut writer => return,
    }
    // Channels went with the reader: nothing of them stays. What is queued (a close reason) may still go out.
    if tokio::time::timeout(Duration::from_secs(2), &mut writer).await.is_err() {
        writer.abort();
    }
}

/// Everything that waits goes out in one write.
async fn write(mut sink: SplitSink<WebSocket, Message>, mut reader: OutboxReader, permit: ConnectionPermit) {
    let mut frames: Vec<Bytes> = Vec::new();
    loop {
        match reader.take(&mut frames).await {
            Ok(()) => {
                while !frames.is_empty() {
                    let may_go = frames.len().min(permit.out_at_once());
                    permit.pace_out(may_go).await;
                    let sent = tokio::time::timeout(WRITE, async {
                        for frame in frames.drain(..may_go) {
                            // Frames are JSON that we encoded: a wrong one would be ours, and is dropped.
                            if let Ok(text) = Utf8Bytes::try_from(frame) {
                                sink.feed(Message::Text(text)).await?;
                            }
                        }
                        sink.flush().await
                    });
                    if !matches!(sent.await, Ok(Ok(()))) {
                        return;
                    }
                }
            }
            Err(reason) => {
                let goodbye = async {
                    let (code, text) = match reason {
                        CloseReason::Slow { queued_bytes } => (1013, format!("too slow: {queued_bytes} bytes were waiting")),
                        CloseReason::Ended(text) => (1012, text.into_owned()),
                        // The client said goodbye first: only its close is still to be answered.
                        CloseReason::Gone => return sink.close().await,
                    };
                    metrics::counter!("walcast_connections_closed_total", "code" => code.to_string()).increment(1);
                    sink.send(Message::Close(Some(CloseFrame { code, reason: text.into() }))).await
                };
                let _ = tokio::time::timeout(Duration::from_secs(2), goodbye).await;
                return;
            }
        }
    }
}

struct Socket {
    app: App,
    vsn: Vsn,
    /// The key that the connection was opened with: what channels use until they are given a token.
    key: String,
    outbox: Outbox,
    permit: ConnectionPermit,
    channels: Channels,
}

impl Socket {
    async fn read(mut self, mut stream: SplitStream<WebSocket>) {
        let drain = self.app.drain.clone();
        let mut farewell = std::pin::pin!(drain.farewell());
        let mut topicless_since = tokio::time::Instant::now();
        loop {
            let next_end = self.channels.next_end();
            let idle = self.app.limits.idle_without_topic;
            if !self.channels.is_empty() || idle.is_zero() {
                topicless_since = tokio::time::Instant::now();
            }
            tokio::select! {
                message = tokio::time::timeout(IDLE, stream.next()) => match message {
                    Ok(Some(Ok(Message::Text(text)))) => self.frame(Inbound::parse_text(self.vsn, &text), text.len()).await,
                    Ok(Some(Ok(Message::Binary(bytes)))) => {
                        let parsed = if self.vsn == Vsn::V2 { Inbound::parse_binary(&bytes) } else { Err(FrameError::Form("binary frames need vsn 2")) };
                        self.frame(parsed, bytes.len()).await;
                    }
                    Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
                    Ok(Some(Ok(Message::Close(_)) | Err(_)) | None) => {
                        // The writer waits for frames: it must hear this too, or the client's close stays unanswered.
                        self.outbox.close(CloseReason::Gone);
                        return;
                    }
                    Err(_) => {
                        self.outbox.close(CloseReason::Ended("no heartbeat for 60 s".into()));
                        return;
                    }
                },
                () = until(next_end) => self.end_due(),
                () = tokio::time::sleep_until(topicless_since + idle), if self.channels.is_empty() && !idle.is_zero() => {
                    let text = format!("no topic for {} s (limits.idle_without_topic)", idle.as_secs());
                    self.outbox.close(CloseReason::Ended(text.into()));
                    return;
                }
                farewell = &mut farewell => {
                    self.outbox.close(CloseReason::Ended(farewell.text().into()));
                    return;
                }
            }
        }
    }

    async fn frame(&mut self, parsed: Result<Inbound, FrameError>, bytes: usize) {
        let frame = match parsed {
            Ok(frame) => frame,
            Err(error) => {
                metrics::counter!("walcast_frames_malformed_total").increment(1);
                let payload = json!({
                    "extension": "system", "status": "error", "channel": "phoenix",
                    "message": format!("MalformedFrame: {error}; the frame was ignored"),
                });
                self.outbox.push(push(self.vsn, "phoenix", "system", payload.to_string().as_bytes()));
                return;
            }
        };
        let topic = self.channels.get(&frame.topic);
        if let Err(refusal) = self.permit.message_in(bytes).and_then(|()| topic.map_or(Ok(()), Channel::message_in)) {
            return self.answer(&frame, "error", json!({ "reason": refusal.phoenix_reason() }));
        }
        match (frame.topic.as_str(), frame.event.as_str()) {
            ("phoenix", "heartbeat") => self.answer(&frame, "ok", json!({})),
            (_, "phx_join") => self.join(frame).await,
            (_, "phx_leave") => self.leave(&frame),
            (topic, event) if self.channels.get(topic).is_some() => match event {
                "access_token" => self.access_token(&frame).await,
                "broadcast" | "presence" => {
                    let reason = format!("{event} is not available in this version of Walcast; postgres_changes is");
                    self.answer(&frame, "error", json!({ "reason": reason }));
                }
                _ => tracing::debug!(topic, event, "an unknown event was ignored"),
            },
            _ => self.answer(&frame, "error", json!({ "reason": "unmatched topic" })),
        }
    }

    fn answer(&self, frame: &Inbound, status: &str, response: serde_json::Value) {
        self.outbox.push(reply(self.vsn, frame, status, &response));
    }

    fn leave(&mut self, frame: &Inbound) {
        let channel = self.channels.remove(&frame.topic);
        self.answer(frame, "ok", json!({}));
        if let Some(channel) = channel {
            self.outbox.push(channel.ended(self.vsn, "phx_close", &json!({})));
        }
    }

    /// Tokens that ran out, quarantines that were not lifted: the channel ends with `phx_error`, so that the
    /// stock client comes back.
    fn end_due(&mut self) {
        for channel in self.channels.take_due() {
            let reason = if channel.is_quarantined() { "the token had expired and no new one came" } else { "Token has expired" };
            self.end_with_error(channel, reason);
        }
    }

    fn end_with_error(&self, channel: Channel, reason: &str) {
        self.outbox.push(channel.system(self.vsn, "system", "error", reason));
        self.outbox.push(channel.ended(self.vsn, "phx_error", &json!({ "reason": reason })));
    }
}

async fn until(at: Option<std::time::SystemTime>) {
    match at {
        Some(at) => tokio::time::sleep(at.duration_since(std::time::SystemTime::now()).unwrap_or_default()).await,
        None => std::future::pending().await,
    }
}

/// Kept here so that `channel` need not know the map's type.
type ByTopic = HashMap<Arc<str>, Channel>;
