//! A subscription enters: check, register, note the position, replay or say resync, answer, release.
//!
//! In this order, so that from the answer on every matching, permitted change is heard once.

use std::sync::Arc;

use bytes::Bytes;
use walcast_auth::{
    Rules,
    binding_check::{self, BindingRefused},
};
use walcast_hub::Outbox;
use walcast_matcher::{Binding, BindingError};
use walcast_model::{Claims, Item, Position, Scope, TableName};
use walcast_pg::PgError;
use walcast_protocol::sse;

use crate::{
    Core, Engine, filters,
    pipeline::announce::{CANDIDATES, frames, resync_frame},
    subscriptions::{Shape, SubscriptionHandle, Wanted},
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
    replay: Replay,
    after: (walcast_model::Lsn, u32),
}

impl Opened {
    pub fn release(self, first: Vec<Bytes>) -> SubscriptionHandle {
        let frames = first.into_iter().chain(self.replay.frames);
        match self.replay.more {
            false => self.handle.subscriber.gate.release(self.after, frames),
            true => self.handle.subscriber.gate.release_part(frames),
        }
        self.handle
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
        let handle =
            core.subscriptions.register(request.claims, request.shape, wanted, request.outbox, core.config.realtime.outbox_bytes);
        core.metrics.subscriptions.set(core.subscriptions.count() as f64);
        // Registered first, noted afterwards: a commit in between is held by the gate and replayed or skipped, not lost.
        let noted = core.progress.taken();
        let Some(cursor) = request.after else {
            // What was flushed before the stream was attached was committed before this subscription began.
            let after = noted.place().max((core.progress.catch_up().before(), u32::MAX));
            let position = Position { lsn: after.0, index: after.1, ..noted };
            return Ok(Opened { handle, opening: Opening::Live, position, replay: Replay::default(), after });
        };
        match replay(core, &handle, cursor, noted).await {
            Ok(replay) => {
                let after = noted.place().max(cursor.place());
                Ok(Opened { handle, opening: Opening::Resumed, position: cursor, replay, after })
            }
            Err(reason) => {
                core.metrics.resyncs.increment(1);
                Ok(Opened {
                    handle,
                    opening: Opening::Resync(reason),
                    position: noted,
                    replay: Replay::default(),
                    after: noted.place(),
                })
            }
        }
    }
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
async fn replay(core: &Core, handle: &SubscriptionHandle, cursor: Position, noted: Position) -> Result<Replay, &'static str> {
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
    let index = handle.subscriber.own_index();
    let mut candidates = Vec::new();
    let mut found = Vec::new();
    let mut replay = Replay { limit_bytes: core.config.realtime.outbox_bytes / 4 * 3, ..Replay::default() };
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
            if candidates.len() >= CANDIDATES {
                replay.add(core, std::mem::take(&mut candidates)).await;
                if replay.more {
                    return Ok(replay);
                }
            }
            if !found.is_empty() {
                let subscriber: &Arc<_> = &handle.subscriber;
                candidates.extend(subscriber.wanting(&found).into_iter().map(|wanting| Candidate {
                    commit,
                    index: *at,
                    change,
                    subscriber: subscriber.clone(),
                    wanting,
                }));
            }
        }
    }
    replay.add(core, candidates).await;
    Ok(replay)
}

/// What a client is replayed at one return: less than its outbox holds, or it would be closed as slow, for ever.
#[derive(Default)]
struct Replay {
    frames: Vec<Bytes>,
    bytes: usize,
    limit_bytes: usize,
    /// It is only a part: the connection ends behind it, and the client comes back for the rest.
    more: bool,
}

impl Replay {
    async fn add(&mut self, core: &Core, candidates: Vec<Candidate<'_>>) {
        let frames = frames(core, candidates).await;
        // Never between two frames of one place: the client would come back behind the second.
        for of_one_place in frames.chunk_by(|(_, a, _), (_, b, _)| a == b) {
            // One at least, however large: each return must lead further.
            if self.bytes > self.limit_bytes {
                self.more = true;
                return;
            }
            for (_, _, frame) in of_one_place {
                self.bytes += frame.len() + 64;
                self.frames.push(frame.clone());
            }
        }
    }
}

/// For connections that end a subscription themselves.
pub fn resync_event(shape: &Shape, position: &Position, reason: &str) -> Bytes {
    resync_frame(shape, position, reason)
}
