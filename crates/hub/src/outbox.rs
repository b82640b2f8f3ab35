//! What one connection has still to send: shared bytes in order, within a limit of bytes and frames.
//!
//! Filled by the pipeline, emptied by the connection's own task ([`outbox`]) or straight into its socket
//! ([`crate::Writers`]). A push never waits. A full outbox takes no more changes: whoever offers them remembers where it
//! stopped and goes on from the replay ring when there is room again. What cannot be had again closes the connection.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::writers::SocketDrain;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// The client does not read what it is sent; how it was noticed.
    Slow(String),
    /// The server ends the connection and says why.
    Ended(String),
    /// The client has gone, or the connection's own task has.
    Gone,
}

#[derive(Debug, Clone, Copy)]
pub struct OutboxLimits {
    /// Changes are taken while less than this waits.
    pub bytes: usize,
    pub frames: usize,
}

/// Answers and notices are taken up to so many times the limits; more would be a client that asks and never reads.
const OWED: usize = 4;

#[derive(Clone, Debug)]
pub struct Outbox(pub(crate) Arc<Inner>);

/// The side of a task that writes by itself; there is one. Dropping it closes the outbox.
#[derive(Debug)]
pub struct OutboxReader(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    limits: OutboxLimits,
    pub(crate) state: Mutex<State>,
    pub(crate) drain: Drain,
}

#[derive(Debug)]
pub(crate) enum Drain {
    Task(Notify),
    Socket(SocketDrain),
}

#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) frames: VecDeque<Bytes>,
    pub(crate) bytes: usize,
    pub(crate) closed: Option<CloseReason>,
    pub(crate) closed_at: Option<Instant>,
    /// Somebody had more than fitted, and wants to hear that there is room.
    pub(crate) wanted: bool,
    pub(crate) socket: SocketState,
}

/// What is known only of an outbox that is written straight into its socket.
#[derive(Debug, Default)]
pub(crate) struct SocketState {
    /// It stands on its shard's list.
    pub(crate) due: bool,
    /// Of the first frame, bytes that were written already.
    pub(crate) offset: usize,
    /// The socket takes nothing since.
    pub(crate) blocked: Option<Instant>,
    pub(crate) said_goodbye: bool,
    /// The last byte is written, or never will be.
    pub(crate) finished: bool,
    /// Closed without what waits, but for the rest of a frame that is on its way.
    pub(crate) cut: bool,
}

/// Counted for each frame beside its bytes: the queue's own cost.
pub(crate) const FRAME_BYTES: usize = 64;

/// An outbox that a task empties.
pub fn outbox(limits: OutboxLimits) -> (Outbox, OutboxReader) {
    let inner = Arc::new(Inner { limits, state: Mutex::default(), drain: Drain::Task(Notify::new()) });
    (Outbox(inner.clone()), OutboxReader(inner))
}

impl Outbox {
    pub(crate) fn with(limits: OutboxLimits, drain: Drain) -> Outbox {
        Outbox(Arc::new(Inner { limits, state: Mutex::default(), drain }))
    }

    /// What the client is owed whatever else waits: an answer, a notice. False if the outbox is closed, also by this very
    /// frame.
    pub fn push(&self, frame: Bytes) -> bool {
        let mut state = self.0.state.lock();
        if state.closed.is_some() {
            return false;
        }
        let OutboxLimits { bytes, frames } = self.0.limits;
        if state.bytes >= bytes.saturating_mul(OWED) || state.frames.len() >= frames.saturating_mul(OWED) {
            let why = format!("{} bytes were waiting, which cannot be had again", state.bytes + frame.len());
            close(&mut state, CloseReason::Slow(why));
        } else {
            add(&mut state, frame);
        }
        let open = state.closed.is_none();
        self.wake(state);
        open
    }

    /// What can be had again: takes frames while there is room, and says how many of them it took. A frame is taken as long
    /// as less than the limit waits before it, however large it is: else it could never be sent. `joined` says that a frame
    /// belongs to the one before it and goes with it.
    pub fn offer(&self, frames: &[Bytes], joined: impl Fn(usize) -> bool) -> usize {
        let mut state = self.0.state.lock();
        if state.closed.is_some() {
            return 0;
        }
        let OutboxLimits { bytes, frames: most } = self.0.limits;
        let mut taken = 0;
        while let Some(frame) = frames.get(taken) {
            if (state.bytes >= bytes || state.frames.len() >= most) && (taken == 0 || !joined(taken)) {
                state.wanted = true;
                break;
            }
            add(&mut state, frame.clone());
            taken += 1;
        }
        self.wake(state);
        taken
    }

    /// Whoever reads hears when there is room again.
    pub fn want_room(&self) {
        let mut state = self.0.state.lock();
        state.wanted = true;
        self.wake(state);
    }

    /// What is queued is dropped, but for a frame that is on its way; the connection hears the reason.
    pub fn close(&self, reason: CloseReason) {
        let mut state = self.0.state.lock();
        if state.closed.is_none() {
            close(&mut state, reason);
        }
        self.wake(state);
    }

    /// What is queued is still sent, then the reason; nothing more is taken.
    pub fn end(&self, reason: CloseReason) {
        let mut state = self.0.state.lock();
        state.closed.get_or_insert(reason);
        state.closed_at.get_or_insert_with(Instant::now);
        self.wake(state);
    }

    /// The last words do not get through: the connection ends without them.
    pub fn abandon(&self) {
        let mut state = self.0.state.lock();
        if state.closed.is_none() {
            close(&mut state, CloseReason::Gone);
        }
        state.socket.finished = true;
        drop(state);
        match &self.0.drain {
            Drain::Task(wake) => wake.notify_one(),
            Drain::Socket(drain) => drain.attention.notify_one(),
        }
    }

    /// As [`Outbox::end`], behind `last`, and nothing in between.
    pub fn end_with(&self, last: Bytes, reason: CloseReason) {
        let mut state = self.0.state.lock();
        if state.closed.is_none() {
            add(&mut state, last);
            state.closed = Some(reason);
            state.closed_at = Some(Instant::now());
        }
        self.wake(state);
    }

    /// The socket may take bytes again.
    pub fn retry(&self) {
        let Drain::Socket(drain) = &self.0.drain else { return };
        let mut state = self.0.state.lock();
        if !std::mem::replace(&mut state.socket.due, true) {
            drop(state);
            drain.shard.add(self.clone());
        }
    }

    /// It would take one more change.
    pub fn has_room(&self) -> bool {
        let state = self.0.state.lock();
        state.bytes < self.0.limits.bytes && state.frames.len() < self.0.limits.frames
    }

    pub fn is_closed(&self) -> bool {
        self.0.state.lock().closed.is_some()
    }

    pub fn close_reason(&self) -> Option<CloseReason> {
        self.0.state.lock().closed.clone()
    }

    /// It takes no more, or had to refuse some that is still to come.
    pub fn is_full(&self) -> bool {
        let state = self.0.state.lock();
        state.wanted || state.bytes >= self.0.limits.bytes || state.frames.len() >= self.0.limits.frames
    }

    /// For how long nothing more has been taken.
    pub fn closed_for(&self) -> Option<Duration> {
        self.0.state.lock().closed_at.map(|since| since.elapsed())
    }

    pub fn queued_bytes(&self) -> usize {
        self.0.state.lock().bytes
    }

    /// Frames and bytes that wait.
    pub fn queued(&self) -> (usize, usize) {
        let state = self.0.state.lock();
        (state.frames.len(), state.bytes)
    }

    /// For how long the socket has taken nothing of what waits.
    pub fn blocked_for(&self) -> Option<Duration> {
        self.0.state.lock().socket.blocked.map(|since| since.elapsed())
    }

    fn wake(&self, mut state: parking_lot::MutexGuard<'_, State>) {
        match &self.0.drain {
            Drain::Task(wake) => {
                // Unlock before waking, or the reader wakes into our lock.
                drop(state);
                wake.notify_one();
            }
            Drain::Socket(drain) => {
                // A socket that takes nothing is looked at again when it says that it does.
                let idle = state.frames.is_empty() && state.closed.is_none() && !state.wanted;
                if idle || state.socket.due || (state.socket.blocked.is_some() && state.closed.is_none()) {
                    return;
                }
                state.socket.due = true;
                drop(state);
                drain.shard.add(self.clone());
            }
        }
    }
}

impl OutboxReader {
    /// Waits for frames and takes all there are, or the reason why no more will come. Nothing taken: there is room again
    /// for those who had more than fitted.
    pub async fn take(&mut self, into: &mut Vec<Bytes>) -> Result<(), CloseReason> {
        let Drain::Task(wake) = &self.0.drain else { return Err(CloseReason::Gone) };
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
                if std::mem::take(&mut state.wanted) {
                    return Ok(());
                }
            }
            wake.notified().await;
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

fn add(state: &mut State, frame: Bytes) {
    state.bytes += frame.len() + FRAME_BYTES;
    state.frames.push_back(frame);
}

pub(crate) fn close(state: &mut State, reason: CloseReason) {
    state.closed = Some(reason);
    state.closed_at = Some(Instant::now());
    state.socket.cut = true;
    let on_its_way = (state.socket.offset > 0).then(|| state.frames.pop_front()).flatten();
    state.bytes = on_its_way.as_ref().map_or(0, |frame| frame.len() + FRAME_BYTES);
    state.frames = on_its_way.into_iter().collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: OutboxLimits = OutboxLimits { bytes: 1_000, frames: 100 };

    #[tokio::test]
    async fn p7_more_than_fits_is_not_taken_and_whoever_had_it_hears_of_room() {
        let (outbox, mut reader) = outbox(LIMITS);
        let frames = vec![Bytes::from_static(&[0; 100]); 20];
        assert_eq!(outbox.offer(&frames, |_| false), 7);
        assert_eq!(outbox.offer(&frames, |_| false), 0);
        let mut taken = Vec::new();
        reader.take(&mut taken).await.unwrap();
        assert_eq!(taken.len(), 7);
        taken.clear();
        reader.take(&mut taken).await.unwrap();
        assert!(taken.is_empty(), "there is room");
        assert_eq!(outbox.offer(&frames[..2], |_| false), 2);
    }

    #[tokio::test]
    async fn p2_what_belongs_together_is_taken_together_and_a_huge_frame_all_the_same() {
        let (outbox, mut reader) = outbox(OutboxLimits { bytes: 10, frames: 100 });
        let frames = vec![Bytes::from_static(&[0; 100]); 4];
        assert_eq!(outbox.offer(&frames, |at| at != 3), 3);
        let mut taken = Vec::new();
        reader.take(&mut taken).await.unwrap();
        assert_eq!(taken.len(), 3);
    }

    #[tokio::test]
    async fn p7_who_asks_and_never_reads_is_closed_with_a_reason_and_its_memory_is_freed() {
        let (outbox, mut reader) = outbox(LIMITS);
        assert!(outbox.push(Bytes::from_static(b"one")));
        let mut frames = Vec::new();
        reader.take(&mut frames).await.unwrap();
        assert_eq!(frames, ["one"]);
        assert!(!(0..100).all(|_| outbox.push(Bytes::from_static(&[0; 100]))));
        assert_eq!(outbox.queued_bytes(), 0);
        assert!(matches!(reader.take(&mut frames).await, Err(CloseReason::Slow(_))));
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_who_left_is_noticed() {
        let (outbox, mut reader) = outbox(LIMITS);
        let waiting = tokio::spawn(async move {
            let mut frames = Vec::new();
            reader.take(&mut frames).await.map(|()| frames)
        });
        outbox.push(Bytes::from_static(b"x"));
        assert_eq!(waiting.await.unwrap().unwrap(), ["x"]);
        assert!(!outbox.push(Bytes::from_static(b"y")), "the reader was dropped");
    }
}
