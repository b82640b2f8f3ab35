//! What one subscription hears, in order and never twice: held back until its join has been answered, let through while
//! it keeps up, and behind, at a known place, when it does not.
//!
//! The pipeline offers, the connection's task releases. A subscription that is behind costs nothing: its task reads on from
//! the replay ring when there is room again, as if the client had come back.

use bytes::Bytes;
use parking_lot::Mutex;
use walcast_model::Lsn;

use crate::{CloseReason, Outbox};

/// Where in the stream a frame belongs: commit and index.
pub type Place = (Lsn, u32);

/// What a subscription did not hear before it was opened.
#[derive(Debug)]
pub struct Missed {
    /// It had heard everything up to here.
    pub from: Place,
    /// With these frames it has heard everything up to here.
    pub to: Place,
    pub places: Vec<Place>,
    pub frames: Vec<Bytes>,
    /// False: there is more behind `to`.
    pub whole: bool,
}

impl Missed {
    pub fn nothing(at: Place) -> Missed {
        Missed { from: at, to: at, places: Vec::new(), frames: Vec::new(), whole: true }
    }
}

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
        /// Where it was before, if it was anywhere: too much to hold leaves it there.
        behind: Option<Place>,
    },
    Open {
        after: Place,
    },
    Behind {
        after: Place,
    },
    /// Another has taken its place.
    Shut,
}

impl Gate {
    /// Holds at most `limit_bytes`. More than that before the join is answered closes the connection, unless the client came
    /// back from a place that can be read on from.
    pub fn holding(outbox: Outbox, limit_bytes: usize, behind: Option<Place>) -> Gate {
        let state = State::Holding { frames: Vec::new(), bytes: 0, behind };
        Gate { outbox, limit_bytes, state: Mutex::new(state) }
    }

    /// Frames in order of their places, all that is said of them; how many went into the outbox. None: the connection is closed.
    pub fn offer(&self, places: &[Place], frames: &[Bytes]) -> Option<usize> {
        let mut state = self.state.lock();
        match &mut *state {
            State::Holding { .. } => {
                let mut held = places.iter().zip(frames);
                held.all(|(place, frame)| self.hold(&mut state, Some(*place), frame.clone())).then_some(0)
            }
            // Pushed under the lock: two offers cannot overtake each other.
            State::Open { after } => {
                let first = places.partition_point(|place| place <= after);
                let (places, frames) = (&places[first..], &frames[first..]);
                let taken = self.outbox.offer(frames, |at| places[at] == places[at - 1]);
                if let Some(last) = taken.checked_sub(1) {
                    *after = places[last];
                }
                if taken < frames.len() {
                    let after = *after;
                    *state = State::Behind { after };
                    if self.outbox.is_closed() {
                        return None;
                    }
                }
                Some(taken)
            }
            State::Behind { .. } if self.outbox.is_closed() => None,
            State::Behind { .. } | State::Shut => Some(0),
        }
    }

    /// Tells the client something that belongs to no place in the order: that it must read again, for one.
    pub fn tell(&self, frame: Bytes) -> bool {
        let mut state = self.state.lock();
        match &mut *state {
            State::Holding { .. } => self.hold(&mut state, None, frame),
            State::Open { .. } | State::Behind { .. } => self.outbox.push(frame),
            State::Shut => false,
        }
    }

    fn hold(&self, state: &mut State, place: Option<Place>, frame: Bytes) -> bool {
        let State::Holding { frames, bytes, behind } = state else { return true };
        *bytes += frame.len();
        if *bytes <= self.limit_bytes {
            frames.push((place, frame));
            return !self.outbox.is_closed();
        }
        match *behind {
            Some(after) => {
                let told: Vec<Bytes> = frames.drain(..).filter(|(place, _)| place.is_none()).map(|(_, frame)| frame).collect();
                *state = State::Behind { after };
                told.into_iter().chain(place.is_none().then_some(frame)).all(|frame| self.outbox.push(frame))
            }
            None => {
                self.outbox.close(CloseReason::Slow(format!("{bytes} bytes came before the join was answered")));
                *frames = Vec::new();
                false
            }
        }
    }

    /// Tells the client how far it has come. Not while held or behind, and never back before what it was sent.
    pub fn advance(&self, place: Place, frame: Bytes) {
        let mut state = self.state.lock();
        if let State::Open { after } = &mut *state
            && place >= *after
        {
            *after = place;
            self.outbox.push(frame);
        }
    }

    /// Sends the answer and what was missed, then what was held since, and opens for good; or falls behind, where there is
    /// more than fits.
    /// How many frames went into the outbox, the answer apart.
    pub fn release(&self, answer: impl IntoIterator<Item = Bytes>, missed: Missed) -> usize {
        let mut state = self.state.lock();
        if matches!(*state, State::Shut) {
            return 0;
        }
        answer.into_iter().all(|frame| self.outbox.push(frame));
        let (held, mut whole) = match std::mem::replace(&mut *state, State::Shut) {
            State::Holding { frames, .. } => (frames, missed.whole),
            // Too much came meanwhile.
            _ => (Vec::new(), false),
        };
        let Missed { from, to, places, frames, .. } = missed;
        let taken = self.outbox.offer(&frames, |at| places[at] == places[at - 1]);
        let mut sent = taken;
        let mut after = match taken.checked_sub(1) {
            Some(last) if taken < frames.len() => places[last],
            None if !frames.is_empty() => from,
            _ => to,
        };
        whole &= taken == frames.len();
        let (placed, told): (Vec<_>, Vec<_>) = held.into_iter().partition(|(place, _)| place.is_some());
        if whole {
            let (places, frames): (Vec<Place>, Vec<Bytes>) =
                placed.into_iter().filter_map(|(place, frame)| Some((place?, frame))).filter(|(place, _)| *place > to).unzip();
            let taken = self.outbox.offer(&frames, |at| places[at] == places[at - 1]);
            sent += taken;
            after = taken.checked_sub(1).map_or(after, |last| places[last]);
            whole = taken == frames.len();
        }
        told.into_iter().all(|(_, frame)| self.outbox.push(frame));
        *state = if whole { State::Open { after } } else { State::Behind { after } };
        if !whole {
            self.outbox.want_room();
        }
        sent
    }

    /// Something that it should have heard was left out: it is behind from where it is.
    pub fn lapse(&self) {
        let mut state = self.state.lock();
        if let State::Open { after } | State::Holding { behind: Some(after), .. } = *state {
            *state = State::Behind { after };
        }
    }

    /// Holds again, to read on: from where. None if it is not behind.
    pub fn hold_behind(&self) -> Option<Place> {
        let mut state = self.state.lock();
        let State::Behind { after } = *state else { return None };
        *state = State::Holding { frames: Vec::new(), bytes: 0, behind: Some(after) };
        Some(after)
    }

    /// Lets nothing more through: how far it came. None if it was never opened.
    pub fn shut(&self) -> Option<Place> {
        match std::mem::replace(&mut *self.state.lock(), State::Shut) {
            State::Open { after } | State::Behind { after } | State::Holding { behind: Some(after), .. } => Some(after),
            State::Holding { behind: None, .. } | State::Shut => None,
        }
    }

    pub fn is_behind(&self) -> bool {
        matches!(*self.state.lock(), State::Behind { .. })
    }

    /// The last place that was let through.
    pub fn after(&self) -> Option<Place> {
        match *self.state.lock() {
            State::Open { after } | State::Behind { after } => Some(after),
            State::Holding { behind, .. } => behind,
            State::Shut => None,
        }
    }

    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OutboxLimits, OutboxReader, outbox};

    fn gate(bytes: usize, limit_bytes: usize) -> (Gate, OutboxReader) {
        let (outbox, reader) = outbox(OutboxLimits { bytes, frames: 1_000 });
        (Gate::holding(outbox, limit_bytes, None), reader)
    }

    fn offer(gate: &Gate, lsn: u64, index: u32, text: &'static str) {
        gate.offer(&[(Lsn(lsn), index)], &[Bytes::from_static(text.as_bytes())]);
    }

    fn missed(from: u64, to: u64, text: &'static str, whole: bool) -> Missed {
        let to = (Lsn(to), 0);
        Missed { from: (Lsn(from), 0), to, places: vec![to], frames: vec![Bytes::from_static(text.as_bytes())], whole }
    }

    async fn heard(reader: &mut OutboxReader) -> Vec<Bytes> {
        let mut frames = Vec::new();
        reader.take(&mut frames).await.unwrap();
        frames
    }

    #[tokio::test]
    async fn p2_nothing_is_heard_before_the_answer_and_nothing_twice() {
        let (gate, mut reader) = gate(10_000, 1_000);
        offer(&gate, 5, 0, "replayed already");
        offer(&gate, 7, 0, "seven");
        gate.release([Bytes::from_static(b"joined")], Missed::nothing((Lsn(6), 3)));
        offer(&gate, 6, 2, "late copy");
        offer(&gate, 8, 0, "eight");
        assert_eq!(heard(&mut reader).await, ["joined", "seven", "eight"]);
        gate.advance((Lsn(7), 3), Bytes::from_static(b"back"));
        gate.advance((Lsn(9), 0), Bytes::from_static(b"nine"));
        assert_eq!(heard(&mut reader).await, ["nine"]);
    }

    #[tokio::test]
    async fn p2_who_falls_behind_knows_where_and_hears_on_from_there() {
        let (gate, mut reader) = gate(100, 1_000);
        gate.release([], Missed::nothing((Lsn(0), 0)));
        let places: Vec<Place> = [(1, 0), (2, 0), (2, 0), (3, 0), (4, 0)].map(|(lsn, index)| (Lsn(lsn), index)).into();
        let frames = vec![Bytes::from_static(b"x"); 5];
        assert_eq!(gate.offer(&places, &frames), Some(3), "two frames of one place stay together");
        assert!(gate.is_behind());
        assert_eq!(gate.offer(&[(Lsn(5), 0)], &frames[..1]), Some(0));
        heard(&mut reader).await;
        assert_eq!(gate.hold_behind(), Some((Lsn(2), 0)));
        offer(&gate, 6, 0, "six");
        gate.release([], missed(2, 5, "three to five", true));
        assert_eq!(heard(&mut reader).await, ["three to five", "six"]);
        assert!(!gate.is_behind());
        assert_eq!(gate.shut(), Some((Lsn(6), 0)));
        assert_eq!(gate.offer(&[(Lsn(7), 0)], &frames[..1]), Some(0));
    }

    #[tokio::test]
    async fn p7_too_much_while_reading_on_leaves_it_behind() {
        let (gate, mut reader) = gate(100, 10);
        gate.release([], missed(0, 1, "one", false));
        assert_eq!(heard(&mut reader).await, ["one"]);
        assert_eq!(gate.hold_behind(), Some((Lsn(1), 0)));
        offer(&gate, 3, 0, "more than is held");
        assert!(gate.is_behind());
        gate.release([], missed(1, 2, "two", true));
        assert_eq!(gate.after(), Some((Lsn(2), 0)));
        assert!(gate.is_behind(), "three is still to be read");
    }

    #[tokio::test]
    async fn p2_who_came_back_to_a_flood_is_answered_and_reads_on() {
        let (outbox, mut reader) = outbox(OutboxLimits { bytes: 10_000, frames: 1_000 });
        let gate = Gate::holding(outbox, 10, Some((Lsn(1), 0)));
        offer(&gate, 4, 0, "more than is held");
        gate.release([Bytes::from_static(b"joined")], missed(1, 3, "two and three", true));
        assert_eq!(heard(&mut reader).await, ["joined", "two and three"]);
        assert_eq!(gate.hold_behind(), Some((Lsn(3), 0)), "four is still to be read");
    }

    #[tokio::test]
    async fn p7_a_join_that_never_ends_does_not_grow() {
        let (gate, mut reader) = gate(10_000, 100);
        let held = (0..20).all(|n| gate.offer(&[(Lsn(n), 0)], &[Bytes::from_static(&[0; 10])]).is_some());
        assert!(!held);
        assert!(matches!(reader.take(&mut Vec::new()).await, Err(CloseReason::Slow(_))));
    }
}
