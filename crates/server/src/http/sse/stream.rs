//! The life of one stream: what its outbox brings, a sign of life where it brings nothing, and its last words.

use std::{
    convert::Infallible,
    pin::Pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use walcast_engine::{
    CloseReason, OutboxReader, SubscriptionHandle, Vital,
    registry::{ConnectionHandle, Listing},
};
use walcast_protocol::sse;

use super::streams::OpenStream;
use crate::http::{
    App,
    drain::Farewell,
    limits::{ConnectionPermit, TopicPermit},
};

/// A quiet stream says at least so often where it stands. Proxies give up after 30 s and more.
const QUIET: Duration = Duration::from_secs(10);
/// How long a client waits before it comes back by itself: at random in between, or a herd would return as one.
const RETRY_MS: std::ops::Range<u64> = 1_000..3_000;

pub struct Live {
    pub app: App,
    pub reader: OutboxReader,
    /// Dropped with the stream: nothing of it stays.
    pub handle: SubscriptionHandle,
    pub open: OpenStream,
    pub permit: ConnectionPermit,
    /// Counts the stream among its resource's and its tenant's.
    pub _topic: TopicPermit,
    /// Of the token or the ticket, in seconds since 1970.
    pub expires_at: u64,
    pub listed: ConnectionHandle,
    pub _listing: Listing,
}

struct Going {
    live: Live,
    /// Taken from the outbox, and not yet allowed out.
    waiting: Vec<Bytes>,
    farewell: Pin<Box<dyn Future<Output = Farewell> + Send>>,
}

/// The first line of every stream.
pub fn retry() -> Bytes {
    format!("retry: {}\n\n", rand::random_range(RETRY_MS)).into()
}

pub fn body(live: Live) -> Body {
    let drain = live.app.drain.clone();
    let farewell = Box::pin(async move { drain.farewell().await });
    Body::from_stream(stream::unfold(Some(Going { live, waiting: Vec::new(), farewell }), next))
}

/// With the last words everything of the stream is dropped.
async fn next(going: Option<Going>) -> Option<(Result<Bytes, Infallible>, Option<Going>)> {
    let mut going = going?;
    let live = &mut going.live;
    // Asked for more: the socket took what it was given.
    live.listed.heard();
    loop {
        if !going.waiting.is_empty() {
            let sent = live.send(&mut going.waiting).await;
            return Some((Ok(sent), Some(going)));
        }
        let quiet = tokio::time::sleep(QUIET);
        let said = tokio::select! {
            // The end first: nothing is said after a token's.
            biased;
            () = until(live.expires_at) => last_words("expired", "the token or ticket has expired: reconnect with a new one"),
            farewell = &mut going.farewell => {
                let mut said = format!("retry: {}\n", farewell.retry.as_millis()).into_bytes();
                said.extend_from_slice(&last_words("closed", &farewell.text()));
                said.into()
            }
            taken = live.reader.take(&mut going.waiting) => match taken {
                // There is room again for what did not fit.
                Ok(()) if going.waiting.is_empty() => {
                    live.app.engine.catch_up(&live.handle).await;
                    continue;
                }
                Ok(()) => continue,
                Err(CloseReason::Slow(_)) => {
                    live.listed.error(Vital::ClosedSlow);
                    last_words("closed", "too slow: reconnect to resume from the last id")
                }
                Err(CloseReason::Ended(reason)) => last_words("closed", &reason),
                Err(CloseReason::Gone) => return None,
            },
            () = quiet => {
                let sign = sign_of_life(live).await;
                return Some((Ok(sign), Some(going)));
            }
        };
        return Some((Ok(said), None));
    }
}

impl Live {
    /// Everything that may go out together goes as one chunk: one write.
    async fn send(&mut self, waiting: &mut Vec<Bytes>) -> Bytes {
        let may_go = waiting.len().min(self.permit.out_at_once());
        self.permit.pace_out(may_go).await;
        let sent: Vec<_> = if may_go == waiting.len() { std::mem::take(waiting) } else { waiting.drain(..may_go).collect() };
        self.open.delivered(sent.iter().filter(|frame| is_change(frame)).count() as u64);
        join(sent)
    }
}

/// The position, or a comment where the stream stands ahead of it: after a restart, until the log has caught up.
async fn sign_of_life(live: &mut Live) -> Bytes {
    let position = live.app.engine.announced();
    let data = serde_json::json!({ "position": position.to_string() }).to_string();
    live.handle.subscriber.gate.advance(position.place(), sse::event("position", Some(&position), data.as_bytes()));
    let mut frames = Vec::new();
    tokio::select! {
        biased;
        taken = live.reader.take(&mut frames) => match taken {
            Ok(()) if !frames.is_empty() => return join(frames),
            // Said only once: there is room again for what did not fit.
            Ok(()) => live.app.engine.catch_up(&live.handle).await,
            // Said again when it is asked for next.
            Err(_) => {}
        },
        () = std::future::ready(()) => {}
    }
    Bytes::from_static(b":\n\n")
}

fn last_words(name: &str, reason: &str) -> Bytes {
    sse::event(name, None, serde_json::json!({ "reason": reason }).to_string().as_bytes())
}

/// As `protocol::sse` writes them: the id's line, then the name's.
fn is_change(frame: &[u8]) -> bool {
    let name = frame.iter().position(|byte| *byte == b'\n').map_or(frame, |end| &frame[end + 1..]);
    name.starts_with(b"event: change\n")
}

fn join(mut frames: Vec<Bytes>) -> Bytes {
    if frames.len() == 1 {
        return frames.swap_remove(0);
    }
    frames.concat().into()
}

async fn until(expires_at: u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    tokio::time::sleep(Duration::from_secs(expires_at).saturating_sub(now)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_told_from_a_position() {
        let position = "5f3a09c1/16/B374D848/3".parse().unwrap();
        assert!(is_change(&sse::event("change", Some(&position), b"{}")));
        for name in ["position", "live", "changes", "resync"] {
            assert!(!is_change(&sse::event(name, Some(&position), b"event: change\n")), "{name}");
        }
    }

    #[test]
    fn clients_are_told_to_come_back_at_different_times() {
        let waits: std::collections::HashSet<_> = (0..100).map(|_| retry()).collect();
        assert!(waits.len() > 50);
        assert!(waits.iter().all(|wait| wait.starts_with(b"retry: ") && wait.ends_with(b"\n\n")));
    }
}
