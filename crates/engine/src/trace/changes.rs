//! What the pipeline tells the taps: what became of a change for one subscriber.

use bytes::Bytes;
use walcast_model::Position;

use super::Happened;
use crate::{Core, subscriptions::Subscriber, visibility::Candidate};

impl Core {
    /// `kind`: delivered, hidden, withheld, resync. `detail`: why.
    pub(crate) fn trace_change(
        &self,
        kind: &'static str,
        candidate: &Candidate<'_>,
        frame: Option<&Bytes>,
        detail: Option<&str>,
    ) {
        if !self.traces.is_on() {
            return;
        }
        let commit = &candidate.commit.commit;
        let position = Position { epoch: self.progress.epoch(), lsn: commit.lsn, index: candidate.index };
        let listed = &candidate.subscriber.listed;
        self.traces.happened(Happened {
            table: Some(&candidate.change.table.name),
            position: Some(&position),
            bytes: frame.map_or(0, |frame| frame.len()),
            committed_at_us: Some(commit.committed_at_us),
            detail,
            payload: frame.map(|frame| &frame[..]),
            ..Happened::of(kind, listed.connection, &listed.topic)
        });
    }

    /// What concerns no single change.
    pub(crate) fn trace_subscriber(&self, kind: &'static str, subscriber: &Subscriber, bytes: usize, detail: Option<&str>) {
        if self.traces.is_on() {
            let listed = &subscriber.listed;
            self.traces.happened(Happened { bytes, detail, ..Happened::of(kind, listed.connection, &listed.topic) });
        }
    }
}
