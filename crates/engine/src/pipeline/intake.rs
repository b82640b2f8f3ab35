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
use walcast_protocol::message::{Message, PREFIX};
use walcast_wal::{Heard, Session, SlotError, SlotState, Stream, StreamConfig, StreamError, checkpoint, ensure_slot};

use crate::{
    Core, EngineError,
    pipeline::{InFlight, Intake},
    progress::StreamState,
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
        self.invalidate(&commit, xid);
        self.handled = commit.lsn;
        self.handled_end = commit.end_lsn;
        self.core.progress.note_invalidated(commit.lsn);
        self.core.cache.note_invalidated(commit.lsn);
        self.core.progress.note_read(commit.end_lsn);
        self.core.metrics.commits.increment(1);
        self.answer_messages(&commit);

        let share = commit.size_bytes.clamp(1, self.room_bytes) as u32;
        let room = match self.room.clone().try_acquire_many_owned(share) {
            Ok(room) => Some(room),
            Err(_) => {
                self.core.metrics.intake_waits.increment(1);
                self.room.clone().acquire_many_owned(share).await.ok()
            }
        };
        // The receiver ends only at shutdown.
        let _ = self.to_settle.send(Intake::Commit(InFlight { commit: Arc::new(commit), xid, room })).await;
    }

    /// Step 5: at once, in LSN order, before anybody can be told.
    fn invalidate(&mut self, commit: &Commit, xid: Xid) {
        let stamp = Stamp { lsn: commit.lsn, xid };
        let clock = self.core.clock.clone();
        let touched = tags(commit);
        if !touched.is_empty() {
            clock.raise(any_change(), stamp);
        }
        for tag in touched {
            clock.raise(tag, stamp);
        }
        let Scope::Whole(items) = &commit.scope else { return };
        for (_, item) in items {
            match item {
                Item::Change(_) => {}
                Item::Redefined(table) => self.redefined(table, commit.lsn),
                Item::Message { prefix, content } if **prefix == *PREFIX => match Message::parse(content) {
                    Some(Message::Invalidate { tags, .. }) => {
                        tags.iter().for_each(|tag| clock.raise(Tag::stored(tag).hash(), stamp));
                    }
                    Some(Message::Heartbeat { .. }) => {}
                    None => tracing::warn!("a logical message with prefix `walcast` cannot be read and is ignored"),
                },
                Item::Message { .. } => {}
            }
        }
    }

    /// The first description in a connection says nothing new; a repeated one means that the table, its policies
    /// or its privileges changed, and retires everything that was derived from them.
    fn redefined(&mut self, table: &Arc<Table>, lsn: Lsn) {
        let first_here = self.described.insert(table.id);
        let before = self.known.insert(table.id, table.clone());
        let same = before.as_ref().is_none_or(|before| **before == **table);
        if first_here && same {
            return;
        }
        tracing::debug!(table = %table.name, "the table was redefined: its cached entries and rules retire");
        let stamp = Stamp::unseen(lsn);
        tags_of_table(table).into_iter().chain(before.iter().flat_map(|b| tags_of_table(b))).for_each(|tag| {
            self.core.clock.raise(tag, stamp);
        });
        self.core.queries.forget_plans_of(&table.name);
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
                Some(Message::Heartbeat { nonce, .. }) if nonce == self.core.nonce => self.core.progress.note_heard(),
                Some(Message::Invalidate { id: Some(id), .. }) => self.core.echoes.came_back(&id, commit.lsn, *index),
                _ => {}
            }
        }
    }

    /// Slot, identity, checkpoint, sentinel, then the stream: in this order, so that no answer is given from
    /// before a crash that we have not noticed.
    pub async fn attach(&mut self) -> Result<Stream, EngineError> {
        let core = self.core.clone();
        let mut control = core.config.connect.connect().await?;
        let slot = match ensure_slot(&control, &core.config.slot).await {
            // Our own walsender may outlive a broken connection for a moment.
            Err(SlotError::InUse { slot, pid }) if self.handled_end > Lsn::ZERO => {
                return Err(SlotError::InUse { slot, pid }.into());
            }
            other => other?,
        };
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
        let fingerprint = walcast_auth::rules_fingerprint(&control).await?;
        let sample = core.sampler.fresh().await?;
        core.progress.note_xmax(sample.snapshot.xmax);

        let running = core.standing.lock().clone();
        let fresh_epoch = Epoch(rand::rng().random());
        let facts = checkpoint::Attaching {
            slot_name: &core.config.slot,
            slot: &slot,
            identity: &identity,
            rules: &fingerprint,
            running: running.as_ref(),
            fresh_epoch,
        };
        let standing = checkpoint::attach(&mut control, &facts, &core.clock).await?;
        core.clock.move_floor(standing.floor);
        if let Some(reason) = standing.moved {
            tracing::info!(reason, epoch = %standing.epoch, floor = standing.floor.0, "no older entry is answered from here on");
        }
        let new_epoch = running.as_ref().is_none_or(|running| running.epoch != standing.epoch);
        if new_epoch {
            self.handled = Lsn::ZERO;
            self.handled_end = Lsn::ZERO;
            core.progress.begin_epoch(standing.epoch, acknowledged);
            core.cache.set_epoch(standing.epoch);
            core.ring.lock().restart(acknowledged);
        }
        if new_epoch && running.is_some() {
            let reason = standing.moved.unwrap_or("a new epoch");
            let _ = self.to_settle.send(Intake::NewEpoch { from: acknowledged, reason }).await;
        }
        // What was acknowledged had settled before.
        core.progress.note_settled(acknowledged);
        core.progress.note_catch_up(identity.flushed);
        *core.standing.lock() = Some(standing);
        *core.fingerprint.lock() = fingerprint;
        let stream = session.start(core.catalog.clone()).await?;
        self.described.clear();
        core.progress.note_stream(StreamState::Attached);
        Ok(stream)
    }
}

impl Core {
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
