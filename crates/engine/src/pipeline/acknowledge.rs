//! The keeper's round, once a second: rules, checkpoint of the tag clock, acknowledgement.
//!
//! The slot is the log: it is acknowledged a little behind, so that a restart can re-read what clients may still ask for,
//! and never above what a checkpoint covers and what has been announced. That we hear is not for this task to prove: see
//! [`super::heartbeat`].

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use walcast_model::{Epoch, Lsn, Tag};
use walcast_pg::PgError;
use walcast_wal::checkpoint;

use super::own_connection::{OwnConnection, who_locks};
use crate::{Core, doctor, invalidation, progress::StreamState};

const TASK: &str = "keeper";
/// A round that takes longer is given up; the next one begins when its last statement has ended.
const ROUND_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_NOT_AVAILABLE: &str = "55P03";

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
    let mut connection = OwnConnection::new(keeper.core.config.connect.clone());
    let mut ticks = tokio::time::interval(keeper.core.config.stream.heartbeat);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            _ = ticks.tick() => {}
        }
        if !matches!(keeper.core.progress.stream(), StreamState::Attached) {
            connection.let_go();
            keeper.core.stuck.over(TASK);
            continue;
        }
        let round = async { keeper.round(connection.client().await?).await };
        match tokio::time::timeout(ROUND_TIMEOUT, round).await {
            Ok(Ok(())) => keeper.core.stuck.over(TASK),
            Ok(Err(error)) => {
                let mut why = error.to_string();
                connection.leave();
                if error.sqlstate() == Some(LOCK_NOT_AVAILABLE) {
                    let asked = async { who_locks(connection.client().await.ok()?).await };
                    match tokio::time::timeout(ROUND_TIMEOUT, asked).await {
                        Ok(holder) => why.extend(holder.map(|holder| format!("; {holder}"))),
                        Err(_) => connection.leave(),
                    }
                }
                tracing::warn!(error = why, "the keeper's round failed; it is tried again");
                keeper.core.stuck.note(TASK, why);
                if error.lets_nobody_in() {
                    keeper.core.server_leaves.notify_waiters();
                }
            }
            Err(_) => {
                connection.leave();
                tracing::warn!("the keeper's round took longer than {ROUND_TIMEOUT:?}; it is tried again");
                keeper.core.stuck.note(TASK, format!("a round took longer than {ROUND_TIMEOUT:?}"));
            }
        }
    }
    // A last checkpoint, so that a restart finds the clock as it was.
    let last = async { keeper.checkpoint(connection.client().await?).await };
    let _ = tokio::time::timeout(Duration::from_secs(3), last).await;
}

impl Keeper {
    /// Each part by itself: what one of them waits for must not hold up the others.
    async fn round(&mut self, client: &mut Client) -> Result<(), PgError> {
        let rules = self.rules(client).await;
        let looked = if self.rounds.is_multiple_of(ROUNDS_TO_LOOK) { self.look(client).await } else { Ok(()) };
        self.rounds += 1;
        let saved = self.checkpoint(client).await;
        saved.and(rules).and(looked)
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

    async fn checkpoint(&mut self, client: &mut Client) -> Result<(), PgError> {
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
            let saved = checkpoint::save(client, &self.core.clock, &beside, &standing, &rules, covered, settled).await?;
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
        Ok(())
    }

    /// What the stream does not tell: role memberships, functions, what happens to quiet tables.
    async fn rules(&mut self, client: &Client) -> Result<(), PgError> {
        let asked = Instant::now();
        let now = walcast_auth::rules_fingerprint(client).await?;
        let moved = std::mem::replace(&mut *self.core.fingerprint.lock(), now.clone()) != now;
        if moved {
            self.core.rules_moved(self.core.progress.read_to());
        }
        self.core.look_at_tables(client, Lsn::ZERO).await?;
        *self.core.rules_read.lock() = asked;
        self.core.look_at_tag_rules_again(client).await
    }
}

/// Carried by every entry whose content depends on who asks.
pub fn rules_tag() -> Tag {
    Tag::stored("~rules")
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
