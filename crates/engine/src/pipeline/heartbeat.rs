//! Writes our own message into the WAL, once a second and whenever somebody waits for the stream to pass what is written.
//!
//! On a connection of its own: what the keeper waits for must not make us deaf. Nothing here takes a lock that anybody could
//! hold. That the message came back is noted by the intake.

use std::{sync::Arc, time::Duration};

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;
use walcast_model::{Lsn, Stamp, Tag};
use walcast_pg::{PgError, quote_literal};
use walcast_protocol::message::{Message, PREFIX};

use super::own_connection::OwnConnection;
use crate::{Core, progress::StreamState};

const TASK: &str = "heartbeat";
/// A message that takes longer is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

pub async fn run(core: Arc<Core>, cancel: CancellationToken) {
    let mut connection = OwnConnection::new(core.config.connect.clone());
    let mut ticks = tokio::time::interval(core.config.stream.heartbeat);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let flush = tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => false,
            () = core.nudge.notified() => true,
        };
        if !matches!(core.progress.stream(), StreamState::Attached) {
            connection.let_go();
            core.stuck.over(TASK);
            continue;
        }
        core.doubt_rules();
        let beat = async { write(connection.client().await?, &core, flush).await };
        let beat = tokio::select! {
            () = cancel.cancelled() => return,
            beat = tokio::time::timeout(WRITE_TIMEOUT, beat) => beat,
        };
        match beat {
            Ok(Ok(())) => core.stuck.over(TASK),
            Ok(Err(error)) => {
                tracing::warn!(%error, "no heartbeat could be written; it is tried again");
                core.stuck.note(TASK, error.to_string());
                connection.leave();
                if error.lets_nobody_in() {
                    core.server_leaves.notify_waiters();
                }
            }
            Err(_) => {
                tracing::warn!("writing a heartbeat took longer than {WRITE_TIMEOUT:?}; it is tried again");
                core.stuck.note(TASK, format!("PostgreSQL has not taken a heartbeat in {WRITE_TIMEOUT:?}"));
                connection.leave();
            }
        }
    }
}

/// Flushed at once when somebody waits for the stream to pass what is written already, else with the next flush.
async fn write(client: &Client, core: &Core, flush: bool) -> Result<(), PgError> {
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

impl Core {
    /// The keeper could not read policies, privileges, roles and what became of quiet tables for longer than anything may
    /// be stale: what was derived from them retires, and everything that is kept falls, until it can.
    fn doubt_rules(&self) {
        let longest = self.config.cache.max_staleness.max(self.config.stream.heartbeat * 5);
        if self.rules_read.lock().elapsed() > longest {
            let read_to = self.progress.read_to();
            self.retire_rules(read_to);
            self.clock.raise(Tag::everything().hash(), Stamp::unseen(Lsn(read_to.0 + 1)));
        }
    }
}
