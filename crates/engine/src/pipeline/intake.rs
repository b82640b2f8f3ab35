//! Reads the stream and invalidates: tag clock first, then everything else.
//!
//! Owns the replication connection. A connection that is away is tried again with backoff, and shown. Never waits for the
//! announcer's decisions, only for room in the queue behind it; then PostgreSQL waits, and the lag shows.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use rand::Rng;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use walcast_matcher::{tags, tags_of_table};
use walcast_model::{Commit, Epoch, Item, Lsn, Scope, Stamp, Table, TableId, Tag, TagHash, Xid};
use walcast_pg::TaggedColumns;
use walcast_protocol::message::{Invalidate, Message, PREFIX};
use walcast_wal::{Heard, Session, SlotState, Stream, StreamConfig, StreamError, checkpoint, ensure_slot};

use crate::{
    Core, EngineError,
    invalidation::Hands,
    pipeline::{InFlight, Intake, acknowledge::rules_tag},
    progress::StreamState,
    table_marks::Suspect,
};

/// Raised by every commit that changed rows: for policies whose reads cannot be told.
pub fn any_change() -> TagHash {
    Tag::stored("~any").hash()
}

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(5);

pub struct IntakeTask {
    core: Arc<Core>,
    to_settle: mpsc::Sender<Intake>,
    /// Bytes between here and the announcer.
    room: Arc<Semaphore>,
    room_bytes: usize,
    acknowledged: watch::Receiver<Lsn>,
    /// End of the last commit handled: where a new connection goes on.
    handled_end: Lsn,
    handled: Lsn,
    known: HashMap<TableId, Arc<Table>>,
    /// Tables that this connection has described.
    described: HashSet<TableId>,
    /// What the catalog said before any entry was answered: what a first description is held against.
    at_start: Option<HashMap<TableId, TaggedColumns>>,
    hands: Hands,
}

impl IntakeTask {
    pub fn new(core: Arc<Core>, to_settle: mpsc::Sender<Intake>, acknowledged: watch::Receiver<Lsn>) -> IntakeTask {
        let room_bytes = core.config.stream.settle_bytes * 2;
        IntakeTask {
            core,
            to_settle,
            room: Arc::new(Semaphore::new(room_bytes)),
            room_bytes,
            acknowledged,
            handled_end: Lsn::ZERO,
            handled: Lsn::ZERO,
            known: HashMap::new(),
            described: HashSet::new(),
            at_start: None,
            hands: Hands::new(),
        }
    }

    /// Runs until cancelled. The first attach has already been done by the caller, so that `serve` can fail clearly.
    pub async fn run(mut self, first: Stream, cancel: CancellationToken) {
        let mut stream = Some(first);
        let mut backoff = BACKOFF_FIRST;
        loop {
            let ended = match stream.take() {
                Some(open) => {
                    self.core.progress.note_stream(StreamState::Attached);
                    match self.listen(open, &cancel).await {
                        None => return,
                        Some(error) => {
                            backoff = BACKOFF_FIRST;
                            error.to_string()
                        }
                    }
                }
                None => match tokio::time::timeout(Duration::from_secs(30), self.attach()).await {
                    Ok(Ok(open)) => {
                        tracing::info!("the stream is back");
                        stream = Some(open);
                        continue;
                    }
                    // Nothing here may be trusted any more: the process ends, and its next start begins a new epoch.
                    Ok(Err(error @ EngineError::Rewound { .. })) => {
                        tracing::error!(%error, "ending");
                        return;
                    }
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "attaching took longer than 30 s".to_owned(),
                },
            };
            self.core.stream_lost(&ended);
            let pause = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
            tracing::warn!(error = %ended, retry_in_ms = pause.as_millis() as u64, "the stream is away");
            backoff = (backoff * 2).min(BACKOFF_MOST);
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// None: cancelled.
    async fn listen(&mut self, mut stream: Stream, cancel: &CancellationToken) -> Option<StreamError> {
        self.described.clear();
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    stream.close().await;
                    return None;
                }
                // A walsender ends only when all that it sent is acknowledged, and we stay behind on purpose. Whoever
                // stops it by force instead gets crash recovery.
                () = self.core.server_leaves.notified() => {
                    return Some(StreamError::Lost("PostgreSQL is shutting down: the connection is let go".into()));
                }
                Ok(()) = self.acknowledged.changed() => stream.acknowledge(*self.acknowledged.borrow_and_update()),
                heard = stream.next() => match heard {
                    Ok(Heard::Commit(commit)) => self.commit(commit).await,
                    Ok(Heard::Idle { read_to }) => self.core.progress.note_read(read_to),
                    Err(error) => return Some(error),
                },
            }
        }
    }

    async fn commit(&mut self, commit: Commit) {
        // A new connection may begin with what was handled before the old one broke.
        if commit.lsn <= self.handled {
            return;
        }
        let xid = Xid::widen(commit.xid, self.core.progress.xmax());
        let suspects = self.invalidate(&commit, xid);
        let suspects = self.core.suspect(commit.lsn, suspects);
        let cascades = self.core.raise_by_rules(&commit, xid);
        self.handled = commit.lsn;
        self.handled_end = commit.end_lsn;
        self.core.note_raised(commit.lsn);
        self.core.progress.note_read(commit.end_lsn);
        self.core.metrics.commits.increment(1);
        self.answer_messages(&commit);

        let share = commit.size_bytes.clamp(1, self.room_bytes) as u32;
        let room = match self.room.clone().try_acquire_many_owned(share) {
            Ok(room) => Some(room),
            Err(_) => {
                self.core.metrics.intake_waits.increment(1);
                self.core.progress.note_intake_waits(true);
                let room = self.room.clone().acquire_many_owned(share).await.ok();
                self.core.progress.note_intake_waits(false);
                room
            }
        };
        // The receiver ends only at shutdown.
        let _ = self.to_settle.send(Intake::Commit(InFlight { commit: Arc::new(commit), xid, room, cascades, suspects })).await;
    }

    /// Step 5: at once, in LSN order, before anybody can be told.
    fn invalidate(&mut self, commit: &Commit, xid: Xid) -> Vec<Suspect> {
        let stamp = Stamp { lsn: commit.lsn, xid };
        let clock = self.core.clock.clone();
        let touched = tags(commit);
        if !touched.is_empty() {
            clock.raise(any_change(), stamp);
        }
        for tag in touched {
            clock.raise(tag, stamp);
        }
        let items = match &commit.scope {
            Scope::Whole(items) => items,
            Scope::TooLarge { tables, .. } => {
                // What it said of them is not kept, only the outcome; messages in it may have meant anything.
                clock.raise(Tag::everything().hash(), stamp);
                let is_news = |table: &&Arc<Table>| self.known.get(&table.id).is_none_or(|known| **known != ***table);
                let news: Vec<_> = tables.iter().filter(is_news).collect();
                return news.into_iter().map(|table| self.described(table, commit.lsn, false)).collect();
            }
        };
        let mut suspects = Vec::new();
        for (at, (_, item)) in items.iter().enumerate() {
            match item {
                Item::Change(_) => {}
                Item::Redefined(table) => {
                    // A root is described with each of its partitions: with a new one, that is the reason.
                    let with_another =
                        matches!(items.get(at + 1), Some((_, Item::Redefined(next))) if !self.described.contains(&next.id));
                    suspects.push(self.described(table, commit.lsn, with_another));
                }
                Item::Message { prefix, content } if **prefix == *PREFIX => {
                    self.hands.hear(&self.core, content, stamp, commit.committed_at_us);
                }
                Item::Message { .. } => {}
            }
        }
        suspects
    }

    /// A description that differs retires at once everything that was derived from the table. One that does not may mean
    /// that its rows, policies or privileges were changed, or nothing at all: whoever can ask the catalog finds out, of either.
    fn described(&mut self, table: &Arc<Table>, lsn: Lsn, with_another: bool) -> Suspect {
        let first_here = self.described.insert(table.id);
        let before = self.known.insert(table.id, table.clone());
        let same = before.as_ref().is_none_or(|before| **before == **table);
        let stamp = Stamp::unseen(lsn);
        if first_here && same {
            self.not_raised(table).into_iter().for_each(|tag| self.core.clock.raise(tag.hash(), stamp));
        }
        if !same {
            tracing::debug!(table = %table.name, "the table was redefined: its cached entries and rules retire");
            let tags = tags_of_table(table).into_iter().chain(before.iter().flat_map(|b| tags_of_table(b)));
            tags.for_each(|tag| self.core.clock.raise(tag, stamp));
            self.core.raise_rules_of(before.iter().chain([table]), stamp);
        }
        self.core.queries.forget_plans_of(&table.name);
        self.core.tracked.lock().forget(&table.name);
        Suspect { table: table.clone(), repeated: !first_here && !with_another }
    }

    /// What an entry may be narrowed by from before this first description, and no commit raises from here on: an
    /// index, a key or a name went while the table was quiet.
    fn not_raised(&self, table: &Table) -> Vec<Tag> {
        let untagged = table.columns.iter().filter(|column| !column.tagged);
        let mut gone: Vec<Tag> = untagged.map(|column| Tag::any_row(&table.name, &column.name)).collect();
        if let Some(then) = self.at_start.as_ref().and_then(|tables| tables.get(&table.id)) {
            let raised = |(name, type_oid): &(String, u32)| {
                let column = table.columns.iter().find(|column| *column.name == **name);
                then.name == table.name && column.is_some_and(|column| column.tagged && column.type_oid == *type_oid)
            };
            gone.extend(then.columns.iter().filter(|column| !raised(column)).map(|(name, _)| Tag::any_row(&then.name, name)));
            if then.name != table.name {
                gone.push(Tag::table(&then.name));
            }
        }
        gone
    }

    /// Wakes those who wrote a message and wait until it has come back.
    fn answer_messages(&self, commit: &Commit) {
        let Scope::Whole(items) = &commit.scope else { return };
        for (index, item) in items {
            let Item::Message { prefix, content } = item else { continue };
            if **prefix != *PREFIX {
                continue;
            }
            match Message::parse(content) {
                Ok(Message::Heartbeat { nonce, at_ms }) if nonce == self.core.nonce => {
                    // When it was written, not when it was read: a lagging stream brings old ones in good order.
                    self.core.progress.note_heard(self.core.started + Duration::from_millis(at_ms));
                }
                Ok(Message::Invalidate(Invalidate { id: Some(id), .. })) => self.core.echoes.came_back(&id, commit.lsn, *index),
                _ => {}
            }
        }
    }

    /// Slot, identity, checkpoint, sentinel, then the stream: in this order, so that no answer is given from
    /// before a crash that we have not noticed.
    pub async fn attach(&mut self) -> Result<Stream, EngineError> {
        let core = self.core.clone();
        let mut control = core.config.connect.connect().await?;
        let slot = ensure_slot(&control, &core.config.slot).await?;
        let config = StreamConfig {
            connect: core.config.connect.clone(),
            slot: core.config.slot.clone(),
            publications: core.publications(&control).await?,
            buffer_events: core.config.stream.intake_events,
            transaction_bytes: core.config.stream.transaction_bytes,
        };
        let acknowledged = match &slot {
            SlotState::Created { at } => *at,
            SlotState::Found { acknowledged } => *acknowledged,
        };
        let begin = if matches!(slot, SlotState::Found { .. }) { self.handled_end } else { Lsn::ZERO };
        let mut session = Session::connect(config, begin, acknowledged).await?;
        let identity = session.identify().await?;
        if identity.flushed < self.handled_end {
            return Err(EngineError::Rewound { handled: self.handled_end, flushed: identity.flushed });
        }
        // Before the fingerprint: what changes in between makes the fingerprint another.
        if self.at_start.is_none() {
            self.at_start = Some(core.catalog.tagged_columns(&core.config.publication_cache).await?);
        }
        let asked = Instant::now();
        core.look_at_tables(&control, identity.flushed).await?;
        let fingerprint = walcast_auth::rules_fingerprint(&control).await?;
        let sample = core.sampler.fresh().await?;
        core.progress.note_xmax(sample.snapshot.xmax);

        let running = core.standing.lock().clone();
        let fresh_epoch = Epoch(rand::rng().random());
        let facts = checkpoint::Attaching {
            slot_name: &core.config.slot,
            slot: &slot,
            identity: &identity,
            rules: &core.checkpoint_rules(&fingerprint).await,
            running: running.as_ref(),
            fresh_epoch,
        };
        let standing = checkpoint::attach(&mut control, &facts, &core.clock).await?;
        core.clock.move_floor(standing.floor);
        match standing.moved {
            // The checkpoint's are gone; ours may still speak of what is read from now on.
            Some(_) => core.cache.forget_kept(),
            None if running.is_none() => core.stand_again(&checkpoint::selections(&control).await?),
            None => {}
        }
        if let Some(reason) = standing.moved {
            tracing::info!(reason, epoch = %standing.epoch, floor = standing.floor.0, "no older entry is answered from here on");
        }
        let new_epoch = running.as_ref().is_none_or(|running| running.epoch != standing.epoch);
        if new_epoch {
            self.handled = Lsn::ZERO;
            self.handled_end = Lsn::ZERO;
            core.cascades.forget();
            core.suspected.forget();
            core.progress.begin_epoch(standing.epoch, acknowledged);
            core.cache.set_epoch(standing.epoch);
            core.ring.lock().restart((acknowledged.before(), u32::MAX));
        }
        if new_epoch && running.is_some() {
            let reason = standing.moved.unwrap_or("a new epoch");
            let _ = self.to_settle.send(Intake::NewEpoch { from: acknowledged, reason }).await;
        }
        // What was acknowledged had settled before.
        core.progress.note_settled(acknowledged.before());
        core.progress.note_catch_up(identity.flushed);
        *core.standing.lock() = Some(standing);
        let before = std::mem::replace(&mut *core.fingerprint.lock(), fingerprint.clone());
        *core.rules_read.lock() = asked;
        if running.is_some() && before != fingerprint {
            core.rules_moved(identity.flushed);
        }
        let stream = session.start(core.catalog.clone()).await?;
        self.described.clear();
        core.progress.note_stream(StreamState::Attached);
        Ok(stream)
    }
}

impl Core {
    /// Policies, privileges, roles or functions changed somewhere: what was derived from them retires, and with it every
    /// answer whose content depends on who asked. `read_to`: the stream's place when it was noticed.
    pub(crate) fn rules_moved(&self, read_to: Lsn) {
        tracing::info!("policies, privileges or roles changed: remembered rules and cached queries retire");
        self.retire_rules(read_to);
    }

    pub(crate) fn retire_rules(&self, read_to: Lsn) {
        self.rules.retire_all();
        self.queries.forget_plans();
        self.tag_rules.outdate();
        // One further: right after a start, answers may be settled up to just where the stream was read to.
        self.clock.raise(rules_tag().hash(), Stamp::unseen(Lsn(read_to.0 + 1)));
    }

    /// From now on nothing is answered as fresh until the sentinel has been looked for.
    pub(crate) fn stream_lost(&self, why: &str) {
        self.progress.note_deaf();
        self.hearing_changed();
        let since = match self.progress.stream() {
            StreamState::Away { since, .. } => since,
            _ => Instant::now(),
        };
        self.progress.note_stream(StreamState::Away { since, why: why.to_owned() });
        self.metrics.stream_losses.increment(1);
    }
}
