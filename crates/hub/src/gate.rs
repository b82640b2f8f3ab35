//! Holds a subscription's frames back until its join has been answered, then lets them through in order.
//!
//! The pipeline offers, the joining task releases. Nothing at or below the released place passes: that was replayed,
//! or was before the subscription began.

use bytes::Bytes;
use parking_lot::Mutex;
use walcast_model::Lsn;

use crate::{CloseReason, Outbox};

/// Where in the stream a frame belongs: commit and index.
pub type Place = (Lsn, u32);

#[derive(Debug)]
pub struct Gate {
    outbox: Outbox,
    limit_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    /// What belongs to no place in the order is let through in any case.
    Holding {
        frames: Vec<(Option<Place>, Bytes)>,
        bytes: usize,
    },
    Open {
        after: Place,
    },
}

impl Gate {
    /// Holds at most `limit_bytes`; more closes the connection, as for any slow client.
    pub fn holding(outbox: Outbox, limit_bytes: usize) -> Gate {
        Gate { outbox, limit_bytes, state: Mutex::new(State::Holding { frames: Vec::new(), bytes: 0 }) }
    }

    /// All that is said of one place. False if the connection is closed.
    pub fn offer(&self, place: Place, said: impl IntoIterator<Item = Bytes>) -> bool {
        let mut state = self.state.lock();
        let mut said = said.into_iter();
        match &mut *state {
            State::Holding { frames, bytes } => said.all(|frame| self.hold(frames, bytes, Some(place), frame)),
            // Pushed under the lock: two offers cannot overtake each other.
            State::Open { after } if place > *after => {
                *after = place;
                said.all(|frame| self.outbox.push(frame))
            }
            State::Open { .. } => true,
        }
    }

    /// Tells the client something that belongs to no place in the order: that it must read again, for one.
    pub fn tell(&self, frame: Bytes) -> bool {
        let mut state = self.state.lock();
        match &mut *state {
            State::Holding { frames, bytes } => self.hold(frames, bytes, None, frame),
            State::Open { .. } => self.outbox.push(frame),
        }
    }

    fn hold(&self, frames: &mut Vec<(Option<Place>, Bytes)>, bytes: &mut usize, place: Option<Place>, frame: Bytes) -> bool {
        *bytes += frame.len();
        if *bytes > self.limit_bytes {
            self.outbox.close(CloseReason::Slow { queued_bytes: *bytes });
            *frames = Vec::new();
            return false;
        }
        frames.push((place, frame));
        !self.outbox.is_closed()
    }

    /// Tells the client how far it has come. Not while held, and never back behind what it was sent.
    pub fn advance(&self, place: Place, frame: Bytes) {
        let mut state = self.state.lock();
        if let State::Open { after } = &mut *state
            && place >= *after
        {
            *after = place;
            self.outbox.push(frame);
        }
    }

    /// Sends `first` and ends the connection behind it: there is more than is given at once, and the client comes back.
    pub fn release_part(&self, first: impl IntoIterator<Item = Bytes>) {
        // Under the lock: nothing that is offered may follow.
        let mut state = self.state.lock();
        let _ = first.into_iter().all(|frame| self.outbox.push_or_end(frame));
        self.outbox.end_behind_queued();
        *state = State::Open { after: (Lsn::MAX, u32::MAX) };
    }

    /// Sends `first` (the join's answer, the replay), then what was held above `after`, and opens for good.
    pub fn release(&self, after: Place, first: impl IntoIterator<Item = Bytes>) {
        let mut state = self.state.lock();
        if !first.into_iter().all(|frame| self.outbox.push_or_end(frame)) {
            // The rest and what was held come after the client's next return.
            *state = State::Open { after };
            return;
        }
        let mut last = after;
        if let State::Holding { frames, .. } = std::mem::replace(&mut *state, State::Open { after }) {
            for (place, frame) in frames.into_iter().filter(|(place, _)| place.is_none_or(|place| place > after)) {
                last = last.max(place.unwrap_or(last));
                self.outbox.push(frame);
            }
        }
        *state = State::Open { after: last };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox;

    #[tokio::test]
    async fn p2_nothing_is_heard_before_the_answer_and_nothing_twice() {
        let (outbox, mut reader) = outbox(10_000);
        let gate = Gate::holding(outbox, 1_000);
        gate.offer((Lsn(5), 0), [Bytes::from_static(b"replayed already")]);
        gate.offer((Lsn(7), 0), [Bytes::from_static(b"seven")]);
        gate.release((Lsn(6), 3), [Bytes::from_static(b"joined")]);
        gate.offer((Lsn(6), 2), [Bytes::from_static(b"late copy")]);
        gate.offer((Lsn(8), 0), [Bytes::from_static(b"eight")]);
        let mut frames = Vec::new();
        reader.take(&mut frames).await.unwrap();
        assert_eq!(frames, ["joined", "seven", "eight"]);
        gate.advance((Lsn(7), 3), Bytes::from_static(b"back"));
        gate.advance((Lsn(9), 0), Bytes::from_static(b"nine"));
        frames.clear();
        reader.take(&mut frames).await.unwrap();
        assert_eq!(frames, ["nine"]);
    }

    #[tokio::test]
    async fn p7_a_join_that_never_ends_does_not_grow() {
        let (outbox, mut reader) = outbox(10_000);
        let gate = Gate::holding(outbox, 100);
        assert!(!(0..20).all(|n| gate.offer((Lsn(n), 0), [Bytes::from_static(&[0; 10])])));
        assert!(matches!(reader.take(&mut Vec::new()).await, Err(CloseReason::Slow { .. })));
    }
}
