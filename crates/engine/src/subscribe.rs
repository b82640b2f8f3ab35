//! A subscription enters: check, register, note the position, replay or say resync, answer, release.
//!
//! In this order, so that from the answer on every matching, permitted change is heard once.

use std::sync::Arc;

use bytes::Bytes;
use walcast_auth::{
    Rules,
    binding_check::{self, BindingRefused},
};
use walcast_hub::{Gate, Missed, Outbox};
use walcast_matcher::{Binding, BindingError};
use walcast_model::{Claims, Item, Position, Scope, TableName};
use walcast_pg::PgError;
use walcast_protocol::sse;

use crate::{
    Core, Engine, filters,
    pipeline::announce::{frames, resync_frame},
    registry::Listed,
    subscriptions::{Shape, Subscriber, SubscriptionHandle, Wanted},
    visibility::{self, Candidate},
};

/// A binding as the client wrote it.
#[derive(Debug, Clone)]
pub struct Asked {
    pub event: String,
    pub schema: Option<String>,
    pub table: Option<String>,
    pub filter: Option<String>,
    /// None: every column that the role may read.
    pub select: Option<Vec<String>>,
    pub client_id: u32,
}

pub struct SubscribeRequest {
    pub claims: Claims,
    pub asked: Vec<Asked>,
    pub shape: Shape,
    pub outbox: Outbox,
    /// Where its deliveries are counted.
    pub listed: Arc<Listed>,
    /// Continue after this position.
    pub after: Option<Position>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    Live,
    Resumed,
    Resync(&'static str),
}

/// Of one topic.
const MAX_BINDINGS: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum SubscribeError {
    #[error("a topic has at most {MAX_BINDINGS} `postgres_changes` bindings, these are {0}: spread them over several topics")]
    TooMany(usize),
    #[error(transparent)]
    Binding(#[from] BindingError),
    #[error(transparent)]
    Refused(#[from] BindingRefused),
    #[error(transparent)]
    Database(#[from] PgError),
}

impl SubscribeError {
    /// The database could not be asked: try again.
    pub fn is_away(&self) -> bool {
        match self {
            SubscribeError::Refused(BindingRefused::Database(error)) | SubscribeError::Database(error) => error.is_away(),
            _ => false,
        }
    }
}

/// Registered and held back. `release` answers the client and lets the frames through.
pub struct Opened {
    pub handle: SubscriptionHandle,
    pub opening: Opening,
    /// Where the client stands with the opening: the id of its first event.
    pub position: Position,
    missed: Missed,
    core: Arc<Core>,
}

impl Opened {
    pub fn release(self, answer: Vec<Bytes>) -> SubscriptionHandle {
        release(&self.core, &self.handle, answer, self.missed);
        self.handle
    }

    /// For a client that was answered long ago: a gap must be told all the same.
    pub fn release_renewed(self) -> SubscriptionHandle {
        let told = match self.opening {
            Opening::Resync(reason) => Some(resync_frame(&self.handle.audience.shape, &self.position, reason)),
            Opening::Live | Opening::Resumed => None,
        };
        self.release(told.into_iter().collect())
    }

    /// The first event of an SSE stream.
    pub fn sse_opening(&self) -> Bytes {
        match self.opening {
            Opening::Live => sse::opening("live", &self.position, None),
            Opening::Resumed => sse::opening("resumed", &self.position, None),
            Opening::Resync(reason) => sse::opening("resync", &self.position, Some(reason)),
        }
    }
}

impl Engine {
    pub async fn subscribe(&self, request: SubscribeRequest) -> Result<Opened, SubscribeError> {
        let core = &*self.core;
        if request.asked.len() > MAX_BINDINGS {
            return Err(SubscribeError::TooMany(request.asked.len()));
        }
        let mut wanted = Vec::with_capacity(request.asked.len());
        for asked in &request.asked {
            wanted.push(check(core, &request.claims, asked).await?);
        }
        let SubscribeRequest { claims, shape, outbox, listed, after, .. } = request;
        let gate = Gate::holding(outbox, core.config.realtime.outbox_bytes, after.map(|position| position.place()));
        let mut handle = core.subscriptions.register(claims, shape, wanted, gate, listed);
        core.metrics.subscriptions.set(core.subscriptions.count() as f64);
        // Registered first, noted afterwards: a commit in between is held by the gate and replayed or skipped, not lost.
        let noted = core.progress.taken();
        handle.epoch = noted.epoch;
        let Some(cursor) = after else {
            // What was flushed before the stream was attached was committed before this subscription began.
            let after = noted.place().max((core.progress.catch_up().before(), u32::MAX));
            let position = Position { lsn: after.0, index: after.1, ..noted };
            return Ok(Opened {
                handle,
                opening: Opening::Live,
                position,
                missed: Missed::nothing(after),
                core: self.core.clone(),
            });
        };
        let (opening, position, missed) = match replay(core, &handle, cursor, noted).await {
            Ok(missed) => (Opening::Resumed, cursor, missed),
            Err(reason) => {
                core.note_resyncs(1);
                (Opening::Resync(reason), noted, Missed::nothing(noted.place()))
            }
        };
        Ok(Opened { handle, opening, position, missed, core: self.core.clone() })
    }

    /// Reads on for a subscription that had more to hear than its outbox took, as if its client had come back. Called by the
    /// connection's task when there is room again.
    pub async fn catch_up(&self, handle: &SubscriptionHandle) {
        let core = &*self.core;
        let gate = &handle.subscriber.gate;
        // A token that has run out is told nothing more; with a new one it goes on from here.
        if handle.audience.is_expired() {
            return;
        }
        // Held first, noted afterwards, as at a join.
        let Some((lsn, index)) = gate.hold_behind() else { return };
        let noted = core.progress.taken();
        core.metrics.catch_ups.increment(1);
        let cursor = Position { lsn, index, ..noted };
        match replay(core, handle, cursor, noted).await {
            Ok(_) if handle.audience.is_expired() => {
                release(core, handle, Vec::new(), Missed { whole: false, ..Missed::nothing(cursor.place()) });
            }
            Ok(missed) => release(core, handle, Vec::new(), missed),
            Err(reason) => {
                core.note_resyncs(1);
                let told = resync_frame(&handle.audience.shape, &noted, reason);
                release(core, handle, vec![told], Missed::nothing(noted.place()));
            }
        }
    }

    /// The same subscription for other claims: from the place that it has come to, judged anew.
    pub async fn renew(&self, old: SubscriptionHandle, claims: Claims, asked: Vec<Asked>) -> Result<Opened, SubscribeError> {
        // Read before the gate is shut: everything up to here has been offered to it.
        let announced = self.core.progress.announced();
        let gate = &old.subscriber.gate;
        let behind = gate.is_behind();
        let place = gate.shut().map(|place| if behind { place } else { place.max(announced.place()) });
        let after = place.map(|(lsn, index)| Position { lsn, index, epoch: old.epoch });
        let (shape, outbox, listed) = (old.audience.shape.clone(), gate.outbox().clone(), old.subscriber.listed.clone());
        drop(old);
        self.subscribe(SubscribeRequest { claims, asked, shape, outbox, listed, after }).await
    }
}

fn release(core: &Core, handle: &SubscriptionHandle, answer: Vec<Bytes>, missed: Missed) {
    let sent = handle.subscriber.gate.release(answer, missed) as u64;
    handle.subscriber.listed.delivered(sent);
    core.note_delivered(sent);
}

async fn check(core: &Core, claims: &Claims, asked: &Asked) -> Result<Wanted, SubscribeError> {
    let (schema, table) = (asked.schema.as_deref(), asked.table.as_deref());
    let mut binding = Binding::parse(&asked.event, schema, table, asked.filter.as_deref(), asked.select.as_deref())?;
    // With a wildcard there is no type to cast to: PostgreSQL compares, change by change.
    let (Some(schema), Some(table)) = (&binding.schema, &binding.table) else {
        let expression = filters::expression(&binding.filters, None).into();
        return Ok(Wanted { binding, client_id: asked.client_id, expression });
    };
    let table = TableName::new(schema, table);
    let shown: Vec<_> = binding.filters.iter().map(|f| (f.condition.column.as_str(), f.condition.to_string())).collect();
    let wanted = binding_check::Wanted { event: &asked.event, table: &table, filters: &shown, select: binding.select.as_deref() };
    let check = |rules: Option<&Rules>| binding_check::check(rules, &core.config.publication_realtime, &wanted).map(drop);
    let mut rules = core.rules.find(core, &table, claims).await?;
    if check(rules.as_deref()).is_err() {
        // Remembered rules never refuse: what was granted just now counts.
        core.rules.forget(&table);
        rules = core.rules.find(core, &table, claims).await?;
        check(rules.as_deref())?;
    }
    let Some(rules) = rules else { return Err(BindingRefused::Filter(format!("{table} is gone")).into()) };
    filters::prepare(core, claims, &rules, &mut binding).await?;
    visibility::prepare(core, claims, &rules).await;
    if let Some(select) = &mut binding.select {
        let keys = rules.columns.iter().filter(|column| column.primary).map(|column| column.name.clone());
        select.extend(keys);
        select.sort_unstable();
        select.dedup();
    }
    let expression = filters::expression(&binding.filters, Some(&rules)).into();
    Ok(Wanted { binding, client_id: asked.client_id, expression })
}

/// The frames between cursor and noted position, or the first of them, or why they cannot be given.
async fn replay(core: &Core, handle: &SubscriptionHandle, cursor: Position, noted: Position) -> Result<Missed, &'static str> {
    // Many come back at once: a few are replayed at a time, the others wait.
    let _turn = core.replays.acquire().await;
    if core.progress.unsettled().is_some() {
        return Err("unsettled");
    }
    if cursor.epoch != noted.epoch {
        return Err("the position is from another epoch");
    }
    let reachable = core.progress.catch_up().max(core.progress.read_to()).max(noted.lsn);
    if cursor.lsn > reachable {
        return Err("the position is ahead of the stream");
    }
    let commits = core.ring.lock().after(cursor.place()).map_err(|_| "the position is older than what is kept")?;
    let SubscriptionHandle { audience, subscriber, .. } = handle;
    let index = audience.own_index();
    let mut candidates = Vec::new();
    let mut found = Vec::new();
    let to = noted.place().max(cursor.place());
    let mut missed = Missed { from: cursor.place(), ..Missed::nothing(to) };
    let mut room = core.config.realtime.outbox_bytes;
    for commit in commits.iter().filter(|commit| commit.commit.lsn <= noted.lsn) {
        let items = match &commit.commit.scope {
            Scope::Whole(items) => items,
            Scope::TooLarge { tables, .. } => {
                let mut heard = Vec::new();
                tables.iter().for_each(|table| index.of_table(table, &mut heard));
                // Who was told so already stands behind it.
                if !heard.is_empty() && (commit.commit.lsn, commit.commit.end_index()) > cursor.place() {
                    return Err("transaction too large");
                }
                continue;
            }
        };
        for (at, item) in items {
            let Item::Change(change) = item else { continue };
            if (commit.commit.lsn, *at) <= cursor.place() {
                continue;
            }
            found.clear();
            index.subscriptions(change, &mut found);
            if candidates.len() >= AT_ONCE
                && !add(core, subscriber, &mut missed, &mut room, std::mem::take(&mut candidates)).await
            {
                return Ok(missed);
            }
            if !found.is_empty() {
                candidates.extend(audience.wanting(&found).into_iter().map(|wanting| Candidate {
                    commit,
                    index: *at,
                    change,
                    audience: audience.clone(),
                    wanting,
                }));
            }
        }
    }
    add(core, subscriber, &mut missed, &mut room, candidates).await;
    Ok(missed)
}

/// Matches that a replay looks at before it sees whether there is still room.
const AT_ONCE: usize = 1_000;

/// Adds what is said of these, until there is no more room; then it was a part, and the rest is read on later.
async fn add(
    core: &Core,
    subscriber: &Subscriber,
    missed: &mut Missed,
    room: &mut usize,
    candidates: Vec<Candidate<'_>>,
) -> bool {
    for (_, place, frame) in frames(core, candidates, Some(subscriber)).await {
        // Never between two frames of one place: the client would come back behind the second. And one at least, however
        // large: each time must lead further.
        if *room == 0 && missed.places.last() != Some(&place) {
            missed.to = missed.places.last().copied().unwrap_or(missed.from);
            missed.whole = false;
            return false;
        }
        *room = room.saturating_sub(frame.len() + 64);
        missed.places.push(place);
        missed.frames.push(frame);
    }
    true
}

/// For connections that end a subscription themselves.
pub fn resync_event(shape: &Shape, position: &Position, reason: &str) -> Bytes {
    resync_frame(shape, position, reason)
}
