//! Tells subscribers of settled commits: match, authorise by group, encode once per shape, hand to outboxes.
//!
//! The only task that announces, so order holds. Never waits for a socket: outboxes bound themselves.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use tokio::sync::mpsc;
use walcast_model::{Cell, Change, Item, Lsn, Position, Row, Scope};
use walcast_protocol::{
    change::{VisibleChange, encode_change},
    phoenix, sse,
};

use crate::{
    Core,
    pipeline::{Announcement, InFlight, Remembered},
    readback::{ReadBack, read_back},
    subscriptions::{Shape, Subscriber},
    visibility::{Candidate, OldView, Verdict, decide},
};

/// Matches that are authorised and encoded at once; more go in several rounds, in order.
pub(crate) const CANDIDATES: usize = 10_000;

pub async fn run(core: Arc<Core>, mut inbox: mpsc::Receiver<Announcement>) {
    while let Some(announcement) = inbox.recv().await {
        match announcement {
            Announcement::Commits(commits) => announce(&core, commits).await,
            Announcement::Resync { reason, at } => {
                // What was let go is gone whole, redefinitions included.
                core.rules.retire_all();
                core.ring.lock().restart((at, u32::MAX));
                core.progress.note_taken(at, u32::MAX);
                resync(&core, &core.subscriptions.all(), (at, u32::MAX), reason);
                core.progress.note_announced(at, u32::MAX);
            }
            // Marks and ring began anew when the stream was attached.
            Announcement::NewEpoch { from, reason } => {
                core.rules.retire_all();
                resync(&core, &core.subscriptions.all(), (from, 0), reason);
            }
        }
    }
}

async fn announce(core: &Core, commits: Vec<InFlight>) {
    let remembered: Vec<Remembered> =
        commits.iter().map(|commit| Remembered { commit: commit.commit.clone(), xid: commit.xid }).collect();
    let mut candidates = Vec::new();
    for commit in &remembered {
        if candidates.len() >= CANDIDATES {
            deliver(core, std::mem::take(&mut candidates)).await;
        }
        // In the ring before it counts as taken: who joins in between finds it in one of the two.
        core.ring.lock().push(commit.clone());
        core.progress.note_taken(commit.commit.lsn, commit.commit.end_index());
        match &commit.commit.scope {
            Scope::TooLarge { tables, .. } => {
                deliver(core, std::mem::take(&mut candidates)).await;
                for table in tables {
                    core.rules.retire(table.id);
                    let place = (commit.commit.lsn, commit.commit.end_index());
                    resync(core, &core.subscriptions.of_table(table), place, "transaction too large");
                }
            }
            Scope::Whole(items) => {
                for (index, item) in items {
                    match item {
                        Item::Change(change) => {
                            if candidates.len() >= CANDIDATES {
                                deliver(core, std::mem::take(&mut candidates)).await;
                            }
                            candidates.extend(core.subscriptions.wanting(change).into_iter().map(|(subscriber, client_ids)| {
                                Candidate { commit, index: *index, change, subscriber, client_ids }
                            }));
                        }
                        Item::Redefined(table) => core.rules.retire(table.id),
                        Item::Message { .. } => {}
                    }
                }
            }
        }
    }
    deliver(core, candidates).await;
    if let Some(last) = remembered.last() {
        core.progress.note_announced(last.commit.lsn, last.commit.end_index());
        core.note_latency(last.commit.committed_at_us);
    }
}

async fn deliver(core: &Core, candidates: Vec<Candidate<'_>>) {
    for (subscriber, place, frame) in frames(core, candidates).await {
        if !subscriber.is_expired() && subscriber.offer(place, frame) {
            core.metrics.delivered.increment(1);
        }
    }
}

/// What each candidate is to be sent, in order; those who may not see get nothing.
pub(crate) async fn frames(core: &Core, candidates: Vec<Candidate<'_>>) -> Vec<(Arc<Subscriber>, (Lsn, u32), Bytes)> {
    if candidates.is_empty() {
        return Vec::new();
    }
    let verdicts = decide(core, &candidates).await;
    let read_back = read_back(core, &candidates, &verdicts).await;
    let mut encoder = Encoder { epoch: core.progress.epoch(), read_back, data: HashMap::new(), frames: HashMap::new() };
    let mut out = Vec::with_capacity(candidates.len());
    let mut told: HashMap<*const Subscriber, &'static str> = HashMap::new();
    for (candidate, verdict) in candidates.into_iter().zip(verdicts) {
        let place = (candidate.commit.commit.lsn, candidate.index);
        let frame = match verdict {
            Verdict::Hide => {
                core.metrics.hidden.increment(1);
                continue;
            }
            Verdict::Show { columns, old } => encoder.frame(&candidate, &columns, old),
            // Once per batch and subscriber: the first tells all.
            Verdict::Unsure(reason) if told.insert(Arc::as_ptr(&candidate.subscriber), reason).is_none() => {
                core.metrics.resyncs.increment(1);
                let position = Position { epoch: encoder.epoch, lsn: place.0, index: place.1 };
                resync_frame(&candidate.subscriber.shape, &position, reason)
            }
            Verdict::Unsure(_) => continue,
        };
        out.push((candidate.subscriber, place, frame));
    }
    out
}

pub(crate) fn resync(core: &Core, subscribers: &[Arc<Subscriber>], place: (Lsn, u32), reason: &str) {
    let position = Position { epoch: core.progress.epoch(), lsn: place.0, index: place.1 };
    for subscriber in subscribers {
        core.metrics.resyncs.increment(1);
        subscriber.gate.tell(resync_frame(&subscriber.shape, &position, reason));
    }
}

pub(crate) fn resync_frame(shape: &Shape, position: &Position, reason: &str) -> Bytes {
    match shape {
        Shape::Sse => sse::opening("resync", position, Some(reason)),
        Shape::Realtime { vsn, topic, .. } => {
            let channel = topic.strip_prefix("realtime:").unwrap_or(topic);
            let payload = serde_json::json!({
                "extension": "postgres_changes", "status": "error", "channel": channel,
                "message": format!("resync: {reason}. Changes may have been missed; read again"),
            });
            phoenix::push(*vsn, topic, "system", payload.to_string().as_bytes())
        }
    }
}

/// A change, the columns that are seen of it, and what of its old image.
type Sight = (Lsn, u32, Arc<[bool]>, OldView);

/// Encodes a change once for everybody who sees the same of it, and a frame once for everybody who gets the same.
struct Encoder {
    epoch: walcast_model::Epoch,
    read_back: ReadBack,
    data: HashMap<Sight, Bytes>,
    frames: HashMap<(*const u8, Shape, Vec<u32>), Bytes>,
}

impl Encoder {
    fn frame(&mut self, candidate: &Candidate<'_>, columns: &Arc<[bool]>, old: OldView) -> Bytes {
        let place = (candidate.commit.commit.lsn, candidate.index);
        let change = self.read_back.get(&place).unwrap_or(candidate.change);
        let committed_at_us = candidate.commit.commit.committed_at_us;
        let encoded = || encode(change, committed_at_us, columns, old);
        let data = self.data.entry((place.0, place.1, columns.clone(), old)).or_insert_with(encoded).clone();
        let position = Position { epoch: self.epoch, lsn: place.0, index: place.1 };
        let ids = match candidate.subscriber.shape {
            Shape::Sse => Vec::new(),
            Shape::Realtime { .. } => candidate.client_ids.clone(),
        };
        let shape = candidate.subscriber.shape.clone();
        let frame = || match &candidate.subscriber.shape {
            Shape::Sse => sse::event("change", Some(&position), &data),
            Shape::Realtime { vsn, topic, positions } => {
                let mut payload = Vec::with_capacity(data.len() + 64);
                payload.extend_from_slice(b"{\"ids\":");
                payload.extend_from_slice(serde_json::json!(ids).to_string().as_bytes());
                if *positions {
                    payload.extend_from_slice(format!(",\"position\":\"{position}\"").as_bytes());
                }
                payload.extend_from_slice(b",\"data\":");
                payload.extend_from_slice(&data);
                payload.push(b'}');
                phoenix::push(*vsn, topic, "postgres_changes", &payload)
            }
        };
        self.frames.entry((data.as_ptr(), shape, ids.clone())).or_insert_with(frame).clone()
    }
}

fn encode(change: &Change, committed_at_us: i64, columns: &[bool], old: OldView) -> Bytes {
    let key_only = match (old, &change.old) {
        (OldView::Key, Some(row)) => {
            let cells = change.table.columns.iter().enumerate();
            Some(Row(cells.map(|(index, column)| if column.key { row.cell(index).clone() } else { Cell::Absent }).collect()))
        }
        _ => None,
    };
    let old = match old {
        OldView::Whole => change.old.as_ref(),
        OldView::Key => key_only.as_ref(),
        OldView::Nothing => None,
    };
    encode_change(&VisibleChange {
        table: &change.table,
        operation: change.operation,
        committed_at_us,
        columns,
        new: change.new.as_ref(),
        old,
        errors: None,
    })
}
