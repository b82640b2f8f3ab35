//! The kill test: a client hears each of 100,000 commits exactly once and in order, while Walcast and PostgreSQL are
//! killed again and again. PostgreSQL's own decoder is the judge.
//!
//! Promises P1 (order) and P2 (no silent gap).

#[path = "kill/judge.rs"]
mod judge;
#[path = "kill/listener.rs"]
mod listener;
mod support;
#[path = "kill/writers.rs"]
mod writers;

use std::time::Duration;

use anyhow::{Context, Result};
use listener::{Habit, Listener};
use support::{Server, migrate};
use walcast_testkit::TestPostgres;
use writers::Writers;

const COMMITS: u64 = 100_000;
const WRITERS: u64 = 8;
/// Above the machine's worst day: only catches hangs.
const DEADLINE: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy)]
enum Blow {
    /// kill -9, and back only after the writers wrote on.
    KillWalcast,
    /// Killed again while it re-reads the log.
    KillWalcastTwice,
    /// Orderly, clients are disconnected.
    RestartPostgres,
    /// kill -9 of the whole server, then crash recovery.
    CrashPostgres,
}

const BLOWS: [Blow; 8] = [
    Blow::KillWalcast,
    Blow::KillWalcast,
    Blow::RestartPostgres,
    Blow::KillWalcastTwice,
    Blow::CrashPostgres,
    Blow::KillWalcast,
    Blow::CrashPostgres,
    Blow::KillWalcastTwice,
];

/// Ring and slot hold everything that the test writes: no cursor is ever too old, so no resync is due.
const SETTINGS: &[(&str, &str)] = &[("WALCAST_STREAM__REPLAY_BYTES", "1GiB"), ("WALCAST_STREAM__ACKNOWLEDGE_AFTER", "1h")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p1_p2_each_change_is_heard_once_and_in_order_while_walcast_and_postgres_are_killed() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, writers::SCHEMA, writers::TABLES).await?;
    let mut server = Server::start(&postgres, SETTINGS).await?;
    let url = format!("{}/sse/v1/changes?schema=public", server.url);
    let token = server.token("service_role", None);
    judge::watch_log(&postgres.connect().await?).await?;
    let mut honest = Listener::start(url.clone(), token.clone(), Habit::Honest).await?;
    let forgets = Listener::start(url.clone(), token.clone(), Habit::Forgets).await?;
    let repeats = Listener::start(url, token, Habit::Repeats).await?;

    // A crash may lose commits of the writer that does not wait for the disk.
    let to_write = COMMITS + COMMITS / 20;
    let share = to_write / (BLOWS.len() as u64 * 2);
    let mut writers = Writers::start(&postgres.url(), WRITERS);
    for blow in BLOWS {
        writers.allow(share);
        honest.wait_more().await?;
        writers.allow(share);
        strike(blow, &mut server, &postgres, &writers).await.with_context(|| format!("{blow:?}"))?;
        writers.wait_done(DEADLINE).await?;
    }
    writers.end().await;
    server.wait_ready(true).await?;
    postgres.execute(&format!("insert into visits values ({}, 0)", listener::LAST)).await?;

    let log = judge::read_log(&postgres.connect().await?).await?;
    let mut ends: Vec<_> = log.iter().map(|logged| logged.end).collect();
    ends.dedup();
    assert!(ends.len() as u64 > COMMITS, "only {} commits with changes are in the log", ends.len());
    let told = honest.told().await.context("the honest client")?;
    assert!(told.returns >= 5, "it was cut off only {} times", told.returns);
    judge::judge(&log, &told.heard)?;

    // The control: whoever does not come back with the id of the last event is found out.
    let lost = judge::judge(&log, &forgets.told().await?.heard).expect_err("a client that forgot its place was not noticed");
    assert!(lost.to_string().contains("were lost"), "{lost}");
    let twice = judge::judge(&log, &repeats.told().await?.heard).expect_err("a client that went back was not noticed");
    assert!(twice.to_string().contains("repeated"), "{twice}");
    server.stop().await
}

/// While the writers write.
async fn strike(blow: Blow, server: &mut Server, postgres: &TestPostgres, writers: &Writers) -> Result<()> {
    match blow {
        Blow::KillWalcast => {
            server.kill9().await?;
            writers.wait_done(DEADLINE).await?;
            server.start_again().await
        }
        Blow::KillWalcastTwice => {
            server.kill9().await?;
            server.start_again().await?;
            server.kill9().await?;
            server.start_again().await
        }
        Blow::RestartPostgres => postgres.restart().await,
        Blow::CrashPostgres => {
            postgres.kill9().await?;
            postgres.start_again().await
        }
    }
}
