//! The keeper's round, once a second: heartbeat into the WAL, checkpoint of the tag clock, acknowledgement, rules.
//!
//! The slot is the log: it is acknowledged a little behind, so that a restart can re-read what clients may still ask for,
//! and never above what a checkpoint covers and what has been announced.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use walcast_model::{Epoch, Lsn, Tag};
use walcast_pg::{PgError, quote_literal};
use walcast_protocol::message::{Message, PREFIX};
use walcast_wal::checkpoint;

use crate::{Core, doctor, invalidation, progress::StreamState};

/// A round that takes longer is given up; the next one begins with a new connection.
const ROUND_TIMEOUT: Duration = Duration::from_secs(10);

/// The doctor looks once in so many rounds.
const ROUNDS_TO_LOOK: u64 = 30;

struct Keeper {
    core: Arc<Core>,
    acknowledge: watch::Sender<Lsn>,
    marks: Marks,
    epoch: Epoch,
    rounds: u64,
}

pub async fn run(core: Arc<Core>, acknowledge: watch::Sender<Lsn>, cancel: CancellationToken) {
    let mut keeper = Keeper { marks: Marks::new(&core), epoch: core.progress.epoch(), rounds: 0, core, acknowledge };
    let mut client: Option<Client> = None;
    let mut ticks = tokio::time::interval(keeper.core.config.stream.heartbeat);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let nudged = tokio::select! {
            () = cancel.cancelled() => break,
            _ = ticks.tick() => false,
            () = keeper.core.nudge.notified() => true,
        };
        if !matches!(keeper.core.progress.stream(), StreamState::Attached) {
            client = None;
            continue;
        }
        // Taken out for the round: whatever goes wrong, the next one connects anew.
        let round = keeper.round(client.take(), nudged);
        match tokio::time::timeout(ROUND_TIMEOUT, round).await {
            Ok(Ok(kept)) => client = Some(kept),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the keeper's round failed; it is tried again");
                if error.lets_nobody_in() {
                    keeper.core.server_leaves.notify_waiters();
                }
            }
            Err(_) => tracing::warn!("the keeper's round took longer than {ROUND_TIMEOUT:?}; it is tried again"),
        }
    }
    // A last checkpoint, so that a restart finds the clock as it was.
    let last = async {
        let client = keeper.core.config.connect.connect().await?;
        keeper.checkpoint(client).await
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), last).await;
}

impl Keeper {
    async fn round(&mut self, client: Option<Client>, nudged: bool) -> Result<Client, PgError> {
        let client = match client {
            Some(client) if !client.is_closed() => client,
            _ => self.core.config.connect.connect().await?,
        };
        heartbeat(&client, &self.core, nudged).await?;
        if nudged {
            return Ok(client);
        }
        self.rules(&client).await?;
        if self.rounds.is_multiple_of(ROUNDS_TO_LOOK) {
            self.look(&client).await?;
        }
        self.rounds += 1;
        self.checkpoint(client).await
    }

    /// What the doctor would warn of now: a new table that nobody publishes is said once, and stays in `/readyz`.
    async fn look(&self, client: &Client) -> Result<(), PgError> {
        let mut now = doctor::warnings(client, &crate::expectations(&self.core.config)).await?;
        now.extend(self.core.tag_rules.warnings());
        let before = std::mem::replace(&mut *self.core.warnings.lock(), now.clone());
        for warning in now.iter().filter(|warning| !before.contains(warning)) {
            tracing::warn!(warning, "`walcast check` says what mends it");
        }
        Ok(())
    }

    async fn checkpoint(&mut self, mut client: Client) -> Result<Client, PgError> {
        if self.epoch != self.core.progress.epoch() {
            // Another slot: what was acknowledged of the old one means nothing.
            self.epoch = self.core.progress.epoch();
            self.marks = Marks::new(&self.core);
            self.acknowledge.send_replace(Lsn::ZERO);
        }
        // Read before the clock is: what was read has been invalidated, but for what cascades have still to raise.
        let covered = self.core.invalidated_whole();
        let settled = self.core.progress.settled();
        let standing = self.core.standing.lock().clone();
        if let Some(standing) = standing {
            let fingerprint = self.core.fingerprint.lock().clone();
            let rules = self.core.checkpoint_rules(&fingerprint).await;
            let keeping = self.core.cache.keeping();
            let beside = invalidation::beside(keeping.as_ref());
            let saved = checkpoint::save(&mut client, &self.core.clock, &beside, &standing, &rules, covered, settled).await?;
            if let Some(keeping) = keeping {
                self.core.cache.kept(&keeping);
            }
            let mut current = self.core.standing.lock();
            // Attached anew meanwhile: that standing is the newer one.
            if current.as_ref().is_some_and(|now| (now.epoch, now.floor) == (saved.epoch, saved.floor)) {
                *current = Some(saved);
            }
        }
        if let Some(lsn) = self.marks.acknowledgeable(&self.core, covered) {
            self.acknowledge.send_if_modified(|at| {
                let further = lsn > *at;
                *at = lsn.max(*at);
                further
            });
        }
        Ok(client)
    }

    /// What the stream does not tell: role memberships, functions, what happens to quiet tables.
    async fn rules(&mut self, client: &Client) -> Result<(), PgError> {
        let now = walcast_auth::rules_fingerprint(client).await?;
        let moved = std::mem::replace(&mut *self.core.fingerprint.lock(), now.clone()) != now;
        if moved {
            self.core.rules_moved(self.core.progress.read_to());
        }
        self.core.look_at_tables(client, Lsn::ZERO).await?;
        self.core.look_at_tag_rules_again(client).await
    }
}

/// Carried by every entry whose content depends on who asks.
pub fn rules_tag() -> Tag {
    Tag::stored("~rules")
}

/// Flushed at once when somebody waits for the stream to pass what is written already, else with the next flush.
async fn heartbeat(client: &Client, core: &Core, flush: bool) -> Result<(), PgError> {
    let at_ms = core.started.elapsed().as_millis() as u64;
    let message = Message::Heartbeat { nonce: core.nonce.clone(), at_ms }.text();
    let commit = if flush { "local" } else { "off" };
    let sql = format!(
        "begin; set local synchronous_commit = {commit}; select pg_logical_emit_message(true, {}, {}); commit",
        quote_literal(PREFIX),
        quote_literal(&message)
    );
    client.batch_execute(&sql).await.map_err(PgError::when("writing a heartbeat"))
}

/// Where the stream was, second by second.
struct Marks {
    marks: VecDeque<(Instant, Lsn)>,
    behind: Duration,
    behind_bytes: u64,
}

impl Marks {
    fn new(core: &Core) -> Marks {
        let limits = &core.config.stream;
        Marks { marks: VecDeque::new(), behind: limits.acknowledge_after, behind_bytes: core.acknowledge_bytes }
    }

    /// The newest mark that is old enough, in time or in WAL.
    fn acknowledgeable(&mut self, core: &Core, covered: Lsn) -> Option<Lsn> {
        let announced = core.progress.announced().lsn;
        // With nothing under way, what was read is done with, also where it held nothing for us.
        let done = if announced >= core.progress.raised() { covered } else { announced.min(covered) };
        self.advance(Instant::now(), done)
    }

    fn advance(&mut self, now: Instant, done: Lsn) -> Option<Lsn> {
        if self.marks.back().is_none_or(|(_, lsn)| *lsn < done) {
            self.marks.push_back((now, done));
        }
        let mut acknowledged = None;
        while let Some((at, lsn)) = self.marks.front() {
            if now.duration_since(*at) < self.behind && done.bytes_since(*lsn) < self.behind_bytes {
                break;
            }
            acknowledged = Some(*lsn);
            self.marks.pop_front();
        }
        acknowledged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p8_the_slot_is_acknowledged_behind_in_time_and_in_bytes() {
        let mut marks = Marks { marks: VecDeque::new(), behind: Duration::from_secs(60), behind_bytes: 1_000 };
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(marks.advance(start, Lsn(100)), None);
        assert_eq!(marks.advance(after(30), Lsn(200)), None);
        assert_eq!(marks.advance(after(61), Lsn(300)), Some(Lsn(100)));
        assert_eq!(marks.advance(after(62), Lsn(1_250)), Some(Lsn(200)), "1,000 bytes behind, whatever the time");
        assert_eq!(marks.advance(after(500), Lsn(1_250)), Some(Lsn(1_250)));
    }
}
