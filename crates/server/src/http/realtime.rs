//! The WebSocket of unmodified Supabase clients: `/realtime/v1/websocket` and `/socket/websocket`.
//!
//! One task reads a connection's frames and keeps its channels; what it says goes through the outbox, as what is announced
//! does, so order is the outbox's order. The engine's writers put it into the socket. [`mod@upgrade`] lets a client in,
//! [`reading`] takes its frames from the socket, [`channel`] holds what a topic is.

mod channel;
mod pace;
mod reading;
mod upgrade;

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use bytes::Bytes;
use serde_json::json;
use tokio::{net::TcpStream, time::Instant};
use walcast_engine::{
    Attention, CloseReason, Outbox, SocketEnd, Vital,
    model::Claims,
    registry::{ConnectionHandle, Kind, NewConnection},
};
use walcast_protocol::{
    phoenix::{FrameError, Inbound, Vsn, push, reply},
    websocket,
};

pub use upgrade::upgrade;

use crate::http::{
    App,
    limits::ConnectionPermit,
    realtime::{
        channel::{Channel, Channels},
        reading::{Heard, Reading},
    },
};

/// Who has been let in.
struct Guest {
    vsn: Vsn,
    /// The key that the connection was opened with: what channels use until they are given a token.
    key: String,
    claims: Claims,
    peer: IpAddr,
    /// As the client calls itself.
    app: Option<String>,
    component: Option<String>,
    permit: ConnectionPermit,
}

async fn run(app: App, guest: Guest, socket: TcpStream, already_read: Bytes) {
    let (direct, end) = app.engine.socket_outbox(socket, goodbye);
    let outbox = pace::paced(&app.engine, direct.clone(), &guest.permit);
    let connection = app.engine.registry().connect(NewConnection {
        kind: if guest.vsn == Vsn::V2 { Kind::WebSocketV2 } else { Kind::WebSocketV1 },
        app: guest.app.as_deref(),
        component: guest.component.as_deref(),
        claims: &guest.claims,
        peer: guest.peer,
        outbox: direct,
    });
    let reading = Reading::new(already_read, app.limits.max_frame_bytes);
    let channels = Channels::new(app.limits.max_topics);
    let Guest { vsn, key, permit, .. } = guest;
    Socket { channels, app, vsn, key, outbox, connection, reading, permit }.run(end).await;
}

/// The last words on a connection.
fn goodbye(reason: &CloseReason) -> Option<Bytes> {
    let (code, text) = match reason {
        CloseReason::Slow(why) => (1013, format!("too slow: {why}")),
        CloseReason::Ended(text) => (1012, text.clone()),
        // The client said goodbye first, and has its answer.
        CloseReason::Gone => return None,
    };
    Some(websocket::close(code, &text))
}

struct Socket {
    app: App,
    vsn: Vsn,
    key: String,
    outbox: Outbox,
    channels: Channels,
    connection: ConnectionHandle,
    reading: Reading,
    permit: ConnectionPermit,
}

/// Whoever stands between this connection's outbox and its socket must hear of the end, too.
impl Drop for Socket {
    fn drop(&mut self) {
        self.outbox.close(CloseReason::Gone);
    }
}

impl Socket {
    async fn run(mut self, end: SocketEnd) {
        // What came with the upgrade is there already.
        let mut ended = !self.heard(&end).await;
        // The socket takes no more for now.
        let mut full = false;
        let drain = self.app.drain.clone();
        let mut farewell = std::pin::pin!(drain.farewell());
        let idle = self.app.limits.idle_without_topic;
        let mut topicless_since = Instant::now();
        loop {
            let next_end = self.channels.next_end();
            if !self.channels.is_empty() {
                topicless_since = Instant::now();
            }
            tokio::select! {
                readable = end.socket.readable(), if !ended => ended = readable.is_err() || !self.heard(&end).await,
                writable = end.socket.writable(), if full => {
                    full = false;
                    ended |= writable.is_err();
                    end.retry();
                }
                attention = end.attention(full) => match attention {
                    Attention::Finished => return self.count(end.close_reason()),
                    Attention::Blocked => full = true,
                    Attention::Room => self.channels.catch_up(&self.app.engine).await,
                },
                () = until(next_end), if !ended => self.end_due(),
                () = tokio::time::sleep_until(topicless_since + idle), if !ended && self.channels.is_empty() && !idle.is_zero() => {
                    let text = format!("no topic for {} s (limits.idle_without_topic)", idle.as_secs());
                    self.outbox.end(CloseReason::Ended(text));
                    ended = true;
                }
                farewell = &mut farewell, if !ended => {
                    self.outbox.end(CloseReason::Ended(farewell.text()));
                    ended = true;
                }
            }
            if ended {
                // Nothing of it stays; what is queued (a close reason) may still go out.
                self.channels.clear();
            }
        }
    }

    /// Why it was closed, also where the last words did not get through.
    fn count(&self, reason: Option<CloseReason>) {
        let code = match reason {
            Some(CloseReason::Slow(_)) => {
                self.connection.error(Vital::ClosedSlow);
                "1013"
            }
            Some(CloseReason::Ended(_)) => "1012",
            Some(CloseReason::Gone) | None => return,
        };
        metrics::counter!("walcast_connections_closed_total", "code" => code).increment(1);
    }

    /// Takes what the client has said. False if that was its last word.
    async fn heard(&mut self, end: &SocketEnd) -> bool {
        // Whoever sends without a pause is not alone, and must hear of the end as well.
        self.reading.begin();
        loop {
            match self.reading.next(&end.socket) {
                Heard::Nothing => {
                    self.answer_controls();
                    return true;
                }
                Heard::Text(text) => {
                    self.connection.heard();
                    self.frame(Inbound::parse_text(self.vsn, &text), text.len()).await;
                }
                Heard::Binary(bytes) => {
                    self.connection.heard();
                    let parsed = match self.vsn {
                        Vsn::V2 => Inbound::parse_binary(&bytes),
                        Vsn::V1 => Err(FrameError::Form("binary frames need vsn 2")),
                    };
                    self.frame(parsed, bytes.len()).await;
                }
                Heard::Pong(payload) => self.connection.pong(&payload),
                Heard::Ping => self.connection.heard(),
                Heard::Wrong(code, why) => {
                    metrics::counter!("walcast_frames_malformed_total").increment(1);
                    self.connection.error(Vital::MalformedFrame);
                    self.outbox.end_with(websocket::close(code, &why), CloseReason::Gone);
                    return false;
                }
                Heard::End => {
                    self.answer_controls();
                    self.outbox.end(CloseReason::Gone);
                    return false;
                }
            }
        }
    }

    /// Pongs, and the answer to a close.
    fn answer_controls(&mut self) {
        if let Some(answer) = self.reading.answers() {
            self.outbox.push(answer);
        }
    }

    async fn frame(&mut self, parsed: Result<Inbound, FrameError>, bytes: usize) {
        let frame = match parsed {
            Ok(frame) => frame,
            Err(error) => {
                metrics::counter!("walcast_frames_malformed_total").increment(1);
                self.connection.error(Vital::MalformedFrame);
                let payload = json!({
                    "extension": "system", "status": "error", "channel": "phoenix",
                    "message": format!("MalformedFrame: {error}; the frame was ignored"),
                });
                self.say(&push(self.vsn, "phoenix", "system", payload.to_string().as_bytes()));
                return;
            }
        };
        let topic = self.channels.get(&frame.topic);
        if let Err(refusal) = self.permit.message_in(bytes).and_then(|()| topic.map_or(Ok(()), Channel::message_in)) {
            return self.answer(&frame, "error", json!({ "reason": refusal.phoenix_reason() }));
        }
        match (frame.topic.as_str(), frame.event.as_str()) {
            ("phoenix", "heartbeat") => self.answer(&frame, "ok", json!({})),
            (_, "phx_join") => self.join(frame, bytes).await,
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
        self.say(&reply(self.vsn, frame, status, &response));
    }

    fn say(&self, text: &[u8]) {
        self.outbox.push(websocket::text(text));
    }

    fn leave(&mut self, frame: &Inbound) {
        let channel = self.channels.remove(&frame.topic);
        self.answer(frame, "ok", json!({}));
        if let Some(channel) = channel {
            self.say(&channel.ended(self.vsn, "phx_close", &json!({})));
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
        self.say(&channel.system(self.vsn, "system", "error", reason));
        self.say(&channel.ended(self.vsn, "phx_error", &json!({ "reason": reason })));
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
