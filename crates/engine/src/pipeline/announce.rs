//! Tells subscribers of settled commits: match, authorise by group, encode once per shape, hand to outboxes.
//!
//! The only task that announces, so order holds. Never waits for a socket: outboxes bound themselves.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use indexmap::IndexMap;
use tokio::sync::mpsc;
use walcast_hub::Place;
use walcast_model::{Cell, Change, Item, Position, Row, Scope};
use walcast_protocol::{
    change::{VisibleChange, encode_change},
    phoenix, sse, websocket,
};

use crate::{
    Core, Vital,
    filters::settle_doubts,
    pipeline::{Announcement, InFlight, Remembered},
    readback::{ReadBack, read_back},
    subscriptions::{Audience, Shape, Subscriber},
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
                            candidates.extend(
                                core.subscriptions.wanting(change).into_iter().map(|(audience, wanting)| Candidate {
                                    commit,
                                    index: *index,
                                    change,
                                    audience,
                                    wanting,
                                }),
                            );
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

/// Frames of one audience, in order of their places.
struct Said {
    audience: Arc<Audience>,
    places: Vec<Place>,
    frames: Vec<Bytes>,
}

async fn deliver(core: &Core, candidates: Vec<Candidate<'_>>) {
    let mut committed_at_us: Vec<u64> =
        candidates.iter().map(|candidate| candidate.commit.commit.committed_at_us as u64).collect();
    committed_at_us.dedup();
    let frames = frames(core, candidates, None).await;
    let mut by_audience: IndexMap<*const Audience, Said> = IndexMap::new();
    for (audience, place, frame) in frames {
        let of = || Said { audience: audience.clone(), places: Vec::new(), frames: Vec::new() };
        let said = by_audience.entry(Arc::as_ptr(&audience)).or_insert_with(of);
        said.places.push(place);
        said.frames.push(frame);
    }
    if by_audience.is_empty() {
        return;
    }
    // One write for each socket, whatever the batch brings it.
    let _turn = core.writers.turn(committed_at_us);
    let (mut delivered, mut dropped) = (0, 0);
    for Said { audience, places, frames } in by_audience.into_values() {
        if audience.is_expired() {
            dropped += audience.drop_frames(frames.len() as u64);
            continue;
        }
        let (taken, owed) = audience.offer(&places, &frames);
        delivered += taken;
        dropped += owed;
    }
    core.note_delivered(delivered);
    core.vitals.add(Vital::Dropped, dropped);
}

/// What each candidate is to be sent, in order; those who may not see get nothing. `only`: it is a replay for this one.
pub(crate) async fn frames(
    core: &Core,
    mut candidates: Vec<Candidate<'_>>,
    only: Option<&Subscriber>,
) -> Vec<(Arc<Audience>, Place, Bytes)> {
    if candidates.is_empty() {
        return Vec::new();
    }
    let mut verdicts = decide(core, &candidates).await;
    settle_doubts(core, &mut candidates, &mut verdicts).await;
    let read_back = read_back(core, &candidates, &verdicts).await;
    let mut encoder = Encoder::new(core, read_back);
    let mut out = Vec::with_capacity(candidates.len());
    let mut told: HashMap<*const Audience, &'static str> = HashMap::new();
    for (candidate, verdict) in candidates.into_iter().zip(verdicts) {
        let place = (candidate.commit.commit.lsn, candidate.index);
        let frame = match verdict {
            Verdict::Hide => {
                core.metrics.hidden.increment(1);
                core.trace_change("hidden", &candidate, only, None, None);
                continue;
            }
            Verdict::Show { columns, old } => {
                let frame = encoder.frame(&candidate, Sight { columns, old, error: None });
                core.trace_change("delivered", &candidate, only, Some(&frame), None);
                frame
            }
            Verdict::Error { error, .. } => {
                core.note_withheld(error);
                core.trace_change("withheld", &candidate, only, None, Some(error));
                encoder.frame(&candidate, Sight { columns: Arc::new([]), old: OldView::Nothing, error: Some(error) })
            }
            // Once per batch and audience: the first tells all.
            Verdict::Unsure(reason) if told.insert(Arc::as_ptr(&candidate.audience), reason).is_none() => {
                core.note_resyncs(1);
                core.trace_change("resync", &candidate, only, None, Some(reason));
                let position = Position { epoch: encoder.epoch, lsn: place.0, index: place.1 };
                resync_frame(&candidate.audience.shape, &position, reason)
            }
            Verdict::Unsure(_) => continue,
        };
        out.push((candidate.audience, place, frame));
    }
    out
}

pub(crate) fn resync(core: &Core, audiences: &[Arc<Audience>], place: Place, reason: &str) {
    let position = Position { epoch: core.progress.epoch(), lsn: place.0, index: place.1 };
    let _turn = core.writers.turn(Vec::new());
    for audience in audiences {
        core.trace_audience("resync", audience, reason);
        core.note_resyncs(audience.tell(&resync_frame(&audience.shape, &position, reason)));
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
            websocket::text(&phoenix::push(*vsn, topic, "system", payload.to_string().as_bytes()))
        }
    }
}

/// The columns that are seen of a change, what of its old image, and why it is not shown.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Sight {
    columns: Arc<[bool]>,
    old: OldView,
    error: Option<&'static str>,
}

/// Encodes a change once for everybody who sees the same of it, and a frame once for everybody who gets the same.
struct Encoder<'a> {
    core: &'a Core,
    epoch: walcast_model::Epoch,
    read_back: ReadBack,
    data: HashMap<(Place, Sight), Bytes>,
    frames: HashMap<(*const u8, Shape, Vec<u32>), Bytes>,
}

impl Encoder<'_> {
    fn new(core: &Core, read_back: ReadBack) -> Encoder<'_> {
        Encoder { core, epoch: core.progress.epoch(), read_back, data: HashMap::new(), frames: HashMap::new() }
    }

    fn frame(&mut self, candidate: &Candidate<'_>, sight: Sight) -> Bytes {
        let place = (candidate.commit.commit.lsn, candidate.index);
        let change = self.read_back.get(&place).unwrap_or(candidate.change);
        let committed_at_us = candidate.commit.commit.committed_at_us;
        let sight = selected(candidate, sight);
        let encoded = || encode(self.core, change, committed_at_us, &sight);
        let data = self.data.entry((place, sight.clone())).or_insert_with(encoded).clone();
        let position = Position { epoch: self.epoch, lsn: place.0, index: place.1 };
        let ids: Vec<u32> = match candidate.audience.shape {
            Shape::Sse => Vec::new(),
            Shape::Realtime { .. } => candidate.wanting.iter().map(|(wanted, _)| wanted.client_id).collect(),
        };
        let shape = candidate.audience.shape.clone();
        let frame = || match &candidate.audience.shape {
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
                websocket::text(&phoenix::push(*vsn, topic, "postgres_changes", &payload))
            }
        };
        self.frames.entry((data.as_ptr(), shape, ids.clone())).or_insert_with(frame).clone()
    }
}

/// Only the columns that were asked for; all bindings of a candidate ask for the same.
fn selected(candidate: &Candidate<'_>, sight: Sight) -> Sight {
    let select = candidate.wanting.first().and_then(|(wanted, _)| wanted.binding.select.as_deref());
    let Some(select) = select else { return sight };
    let columns = candidate.change.table.columns.iter().zip(sight.columns.iter());
    let columns = columns.map(|(column, visible)| *visible && select.iter().any(|name| **name == *column.name)).collect();
    Sight { columns, ..sight }
}

/// Values up to this size stay in a change that is too large to be shown whole.
const SMALL_BYTES: usize = 64;

fn encode(core: &Core, change: &Change, committed_at_us: i64, sight: &Sight) -> Bytes {
    let key_only = match (sight.old, &change.old) {
        (OldView::Key, Some(row)) => {
            let cells = change.table.columns.iter().enumerate();
            Some(Row(cells.map(|(index, column)| if column.key { row.cell(index).clone() } else { Cell::Absent }).collect()))
        }
        _ => None,
    };
    let old = match sight.old {
        OldView::Whole => change.old.as_ref(),
        OldView::Key => key_only.as_ref(),
        OldView::Nothing => None,
    };
    let visible = |new, old, errors| {
        encode_change(&VisibleChange {
            table: &change.table,
            operation: change.operation,
            committed_at_us: (sight.error.is_none()).then_some(committed_at_us),
            columns: &sight.columns,
            new,
            old,
            errors,
        })
    };
    let whole = visible(change.new.as_ref(), old, sight.error);
    if whole.len() <= core.config.realtime.change_bytes {
        return whole;
    }
    const ERROR: &str = "Error 413: Payload Too Large";
    core.note_withheld(ERROR);
    let small = |row: &Row| {
        let fits = |cell: &Cell| !matches!(cell, Cell::Value(bytes) if bytes.len() > SMALL_BYTES);
        Row(row.0.iter().map(|cell| if fits(cell) { cell.clone() } else { Cell::Absent }).collect())
    };
    let (new, old) = (change.new.as_ref().map(small), old.map(small));
    visible(new.as_ref(), old.as_ref(), Some(ERROR))
}
