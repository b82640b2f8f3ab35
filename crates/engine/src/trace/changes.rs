//! What the pipeline tells the taps: what became of a change for one subscriber.

use bytes::Bytes;
use walcast_model::Position;

use super::Happened;
use crate::{
    Core,
    registry::Listed,
    subscriptions::{Audience, Subscriber},
    visibility::Candidate,
};

impl Core {
    /// `kind`: delivered, hidden, withheld, resync. `only`: for this one of the audience. `detail`: why.
    pub(crate) fn trace_change(
        &self,
        kind: &'static str,
        candidate: &Candidate<'_>,
        only: Option<&Subscriber>,
        frame: Option<&Bytes>,
        detail: Option<&str>,
    ) {
        if !self.traces.is_on() {
            return;
        }
        let commit = &candidate.commit.commit;
        let position = Position { epoch: self.progress.epoch(), lsn: commit.lsn, index: candidate.index };
        let tell = |listed: &Listed| {
            self.traces.happened(Happened {
                table: Some(&candidate.change.table.name),
                position: Some(&position),
                bytes: frame.map_or(0, |frame| frame.len()),
                committed_at_us: Some(commit.committed_at_us),
                detail,
                payload: frame.map(|frame| &frame[..]),
                ..Happened::of(kind, listed.connection, &listed.topic)
            })
        };
        match only {
            Some(subscriber) => tell(&subscriber.listed),
            None => candidate.audience.each_listed(tell),
        }
    }

    /// What concerns no single change.
    pub(crate) fn trace_audience(&self, kind: &'static str, audience: &Audience, detail: &str) {
        if self.traces.is_on() {
            audience.each_listed(|listed| {
                let event = Happened::of(kind, listed.connection, &listed.topic);
                self.traces.happened(Happened { detail: Some(detail), ..event });
            });
        }
    }
}
