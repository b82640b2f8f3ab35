//! What one connection has still to send: shared bytes in order, within a limit.
//!
//! Filled by the pipeline, emptied by the connection's own task. A push never waits: an outbox above its limit closes
//! with a reason, its memory is freed at once, and the client resumes from its position.

use std::{borrow::Cow, collections::VecDeque, sync::Arc};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// The client read more slowly than it was told.
    Slow { queued_bytes: usize },
    /// The server ends the connection and says why.
    Ended(Cow<'static, str>),
    /// The connection's own task has gone.
    Gone,
}

#[derive(Clone, Debug)]
pub struct Outbox(Arc<Inner>);

/// The connection's side; there is one. Dropping it closes the outbox.
#[derive(Debug)]
pub struct OutboxReader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit_bytes: usize,
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Bytes>,
    bytes: usize,
    closed: Option<CloseReason>,
}

/// Counted for each frame beside its bytes: the queue's own cost.
const FRAME_BYTES: usize = 64;

pub fn outbox(limit_bytes: usize) -> (Outbox, OutboxReader) {
    let inner = Arc::new(Inner { limit_bytes, state: Mutex::default(), wake: Notify::new() });
    (Outbox(inner.clone()), OutboxReader(inner))
}

impl Outbox {
    /// False if the outbox is closed, also by this very frame. A frame is taken as long as less than the limit waits
    /// before it, however large it is: else it could never be sent, and its client would come back for it for ever.
    pub fn push(&self, frame: Bytes) -> bool {
        let mut state = self.0.state.lock();
        if state.closed.is_some() {
            return false;
        }
        if state.bytes >= self.0.limit_bytes {
            let queued_bytes = state.bytes + frame.len();
            close(&mut state, CloseReason::Slow { queued_bytes });
        } else {
            state.bytes += frame.len() + FRAME_BYTES;
            state.frames.push_back(frame);
        }
        let open = state.closed.is_none();
        // Unlock before waking, or the reader wakes into our lock.
        drop(state);
        self.0.wake.notify_one();
        open
    }

    /// As [`Outbox::push`], but for what is owed to a client that came back: where it is more than fits, the client still
    /// gets what is queued, then the connection ends, and it comes back for the rest from further on.
    pub fn push_or_end(&self, frame: Bytes) -> bool {
        if self.queued_bytes() >= self.0.limit_bytes {
            self.end_behind_queued();
            return false;
        }
        self.push(frame)
    }

    /// What is queued is still sent; nothing more is taken.
    pub fn end_behind_queued(&self) {
        let mut state = self.0.state.lock();
        if state.closed.is_none() {
            state.closed =
                Some(CloseReason::Ended("more is waiting than fits: reconnect to resume from the last position".into()));
        }
        drop(state);
        self.0.wake.notify_one();
    }

    /// What is queued is dropped; the reader gets the reason next.
    pub fn close(&self, reason: CloseReason) {
        let mut state = self.0.state.lock();
        if state.closed.is_none() {
            close(&mut state, reason);
        }
        drop(state);
        self.0.wake.notify_one();
    }

    pub fn is_closed(&self) -> bool {
        self.0.state.lock().closed.is_some()
    }

    pub fn queued_bytes(&self) -> usize {
        self.0.state.lock().bytes
    }
}

impl OutboxReader {
    /// Waits for frames and takes all there are, or the reason why no more will come.
    pub async fn take(&mut self, into: &mut Vec<Bytes>) -> Result<(), CloseReason> {
        loop {
            {
                let mut state = self.0.state.lock();
                if !state.frames.is_empty() {
                    into.extend(state.frames.drain(..));
                    state.bytes = 0;
                    // A burst's queue is not kept for the idle hours after it.
                    state.frames.shrink_to(16);
                    return Ok(());
                }
                if let Some(reason) = &state.closed {
                    return Err(reason.clone());
                }
            }
            self.0.wake.notified().await;
        }
    }
}

impl Drop for OutboxReader {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        if state.closed.is_none() {
            close(&mut state, CloseReason::Gone);
        }
    }
}

fn close(state: &mut State, reason: CloseReason) {
    state.closed = Some(reason);
    state.frames = VecDeque::new();
    state.bytes = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn p7_a_slow_client_is_closed_with_a_reason_and_its_memory_is_freed() {
        let (outbox, mut reader) = outbox(1_000);
        assert!(outbox.push(Bytes::from_static(b"one")));
        let mut frames = Vec::new();
        reader.take(&mut frames).await.unwrap();
        assert_eq!(frames, ["one"]);
        assert!(!(0..100).all(|_| outbox.push(Bytes::from_static(&[0; 100]))));
        assert_eq!(outbox.queued_bytes(), 0);
        assert!(matches!(reader.take(&mut frames).await, Err(CloseReason::Slow { .. })));
    }

    #[tokio::test]
    async fn p2_whoever_comes_back_for_more_than_fits_gets_a_part_and_then_the_end() {
        let (outbox, mut reader) = outbox(300);
        let taken = (0..10).take_while(|_| outbox.push_or_end(Bytes::from_static(&[0; 100]))).count();
        assert_eq!(taken, 2);
        let mut frames = Vec::new();
        reader.take(&mut frames).await.unwrap();
        assert_eq!(frames.len(), 2);
        assert!(matches!(reader.take(&mut frames).await, Err(CloseReason::Ended(_))));
    }

    #[tokio::test]
    async fn p2_a_frame_above_the_limit_is_sent_all_the_same() {
        let (outbox, mut reader) = outbox(300);
        assert!(outbox.push_or_end(Bytes::from_static(b"opening")) && outbox.push(Bytes::from_static(&[0; 1_000])));
        let mut frames = Vec::new();
        reader.take(&mut frames).await.unwrap();
        assert_eq!(frames.len(), 2);
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_who_left_is_noticed() {
        let (outbox, mut reader) = outbox(1_000);
        let waiting = tokio::spawn(async move {
            let mut frames = Vec::new();
            reader.take(&mut frames).await.map(|()| frames)
        });
        outbox.push(Bytes::from_static(b"x"));
        assert_eq!(waiting.await.unwrap().unwrap(), ["x"]);
        assert!(!outbox.push(Bytes::from_static(b"y")), "the reader was dropped");
    }
}
