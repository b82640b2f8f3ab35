//! The server itself: version, WAL, slots, clock.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio_postgres::{Client, Row, types::Type};
use walcast_pg::{ConnectConfig, PgError, quote_literal};

use super::{Expectations, Finding};

const MIB: i64 = 1024 * 1024;

pub(super) fn connected(config: &ConnectConfig) -> Finding {
    // Platforms put their transaction pooler on this port; replication does not pass through it.
    match config.parts().1 {
        6543 => Finding::warn(
            "connection",
            format!("{config} answers, but port 6543 is usually a pooler, and replication needs the server itself"),
            "give the direct connection's URL, usually port 5432",
        ),
        _ => Finding::ok("connection", format!("{config} answers")),
    }
}

/// What no setting of ours can make up for.
pub(super) async fn fitness(client: &Client) -> Result<Vec<Finding>, PgError> {
    let sql = "select current_setting('server_version_num')::int4, current_setting('server_version'), \
               current_setting('wal_level'), pg_is_in_recovery()";
    let row = one(client, "reading the server's version", sql).await?;
    let (number, version, wal_level, standby): (i32, &str, &str, bool) = (row.get(0), row.get(1), row.get(2), row.get(3));
    let mut findings = vec![match number >= 150_000 {
        true => Finding::ok("version", format!("PostgreSQL {version}")),
        false => Finding::fail("version", format!("PostgreSQL {version} is too old"), "upgrade to PostgreSQL 15 or newer"),
    }];
    findings.push(match wal_level {
        "logical" => Finding::ok("wal_level", "wal_level is logical"),
        other => Finding::fail(
            "wal_level",
            format!("wal_level is {other}, so row changes cannot be read"),
            "alter system set wal_level = logical;\n-- then restart PostgreSQL (managed: the parameter may be called rds.logical_replication or cloudsql.logical_decoding)",
        ),
    });
    if standby {
        findings.push(Finding::fail("primary", "this server is a standby", "give the URL of the primary"));
    }
    Ok(findings)
}

pub(super) async fn capacity(client: &Client, expect: &Expectations) -> Result<Vec<Finding>, PgError> {
    let sql = "select current_setting('max_replication_slots')::int8, \
                 (select count(*) from pg_catalog.pg_replication_slots), \
                 current_setting('max_wal_senders')::int8, (select count(*) from pg_catalog.pg_stat_replication), \
                 (select setting::int8 from pg_catalog.pg_settings where name = 'max_slot_wal_keep_size'), \
                 current_setting('max_connections')::int8, \
                 exists (select from pg_catalog.pg_replication_slots where slot_name = $1)";
    const DOING: &str = "reading the server's limits";
    let rows = client.query_typed(sql, &[(&expect.slot, Type::TEXT)]).await.map_err(PgError::when(DOING))?;
    let row = rows.first().ok_or_else(|| unexpected(DOING))?;
    let number = |index: usize| row.get::<_, i64>(index);
    let have_slot: bool = row.get(6);

    let (slots, slots_used) = (number(0), number(1));
    let slots_finding = match slots_used < slots || have_slot {
        true => Finding::ok("replication_slots", format!("{slots_used} of {slots} replication slots are in use")),
        false => Finding::fail(
            "replication_slots",
            format!("all {slots} replication slots are in use"),
            format!(
                "alter system set max_replication_slots = {};\n-- then restart PostgreSQL; or drop a slot that nobody reads: select slot_name from pg_replication_slots where not active;",
                slots + 5
            ),
        ),
    };
    let (senders, senders_used) = (number(2), number(3));
    let senders_finding = match senders_used < senders {
        true => Finding::ok("wal_senders", format!("{senders_used} of {senders} WAL senders are in use")),
        false => Finding::fail(
            "wal_senders",
            format!("all {senders} WAL senders are in use"),
            format!("alter system set max_wal_senders = {};\n-- then restart PostgreSQL", senders + 5),
        ),
    };
    let connections = match expect.max_connections as i64 * 2 > number(5) {
        false => Finding::ok("connections", format!("Walcast may open {} of {} connections", expect.max_connections, number(5))),
        true => Finding::warn(
            "connections",
            format!("Walcast may open {} of the server's {} connections", expect.max_connections, number(5)),
            "lower database.max_connections, or raise max_connections in PostgreSQL",
        ),
    };
    Ok(vec![slots_finding, senders_finding, keep_size(number(4), expect.acknowledge_bytes), connections])
}

/// The setting is in MB; -1 is unlimited.
fn keep_size(megabytes: i64, acknowledge_bytes: u64) -> Finding {
    const CHECK: &str = "max_slot_wal_keep_size";
    let wanted = i64::try_from(acknowledge_bytes / MIB as u64).unwrap_or(i64::MAX);
    match megabytes {
        ..0 => Finding::warn(
            CHECK,
            "max_slot_wal_keep_size is unlimited: a slot that nobody reads can fill the disk",
            "alter system set max_slot_wal_keep_size = '10GB';\nselect pg_reload_conf();",
        ),
        limit if limit / 10 < wanted => Finding::warn(
            CHECK,
            format!(
                "max_slot_wal_keep_size is {limit} MB, so at most a tenth of it is held back for replay, not the {wanted} MB of stream.acknowledge_bytes"
            ),
            format!("alter system set max_slot_wal_keep_size = '{}MB';\nselect pg_reload_conf();", wanted.saturating_mul(10)),
        ),
        limit => Finding::ok(CHECK, format!("max_slot_wal_keep_size is {limit} MB")),
    }
}

/// A finding of its own name: whoever serves is the reader, and need not be warned of itself.
pub(super) const SLOT_IN_USE: &str = "slot in use";

pub(super) async fn slot(client: &Client, expect: &Expectations) -> Result<Vec<Finding>, PgError> {
    const CHECK: &str = "slot";
    const DOING: &str = "reading the replication slot";
    let sql = "select coalesce(plugin::text, 'physical replication'), database::text, current_database()::text, active_pid, \
               coalesce(wal_status, ''), coalesce(pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn() \
               else pg_current_wal_lsn() end, restart_lsn)::int8, 0) from pg_catalog.pg_replication_slots where slot_name = $1";
    let rows = client.query_typed(sql, &[(&expect.slot, Type::TEXT)]).await.map_err(PgError::when(DOING))?;
    let name = &expect.slot;
    let Some(row) = rows.first() else {
        return Ok(vec![Finding::ok(CHECK, format!("slot {name} does not exist yet; `serve` makes it"))]);
    };
    let (plugin, database, here): (&str, Option<&str>, &str) = (row.get(0), row.get(1), row.get(2));
    let (pid, wal_status, held): (Option<i32>, &str, i64) = (row.get(3), row.get(4), row.get(5));
    let drop_it = format!("select pg_drop_replication_slot({});", quote_literal(name));
    if plugin != "pgoutput" || database != Some(here) {
        let line = format!("slot {name} belongs to somebody else: {plugin}, database {}", database.unwrap_or("none"));
        return Ok(vec![Finding::fail(CHECK, line, format!("choose another name with database.slot, or drop it: {drop_it}"))]);
    }
    let held = held / MIB;
    Ok(vec![match (wal_status, pid) {
        ("lost", _) => Finding::warn(
            CHECK,
            format!(
                "slot {name} lost its WAL (it fell behind max_slot_wal_keep_size); `serve` makes a new one and every subscriber resyncs"
            ),
            format!("to make room now: {drop_it}"),
        ),
        (_, Some(pid)) => Finding::warn(
            SLOT_IN_USE,
            format!("slot {name} is being read by PID {pid} and holds back {held} MB of WAL: a second `serve` would not start"),
            "as it should be while Walcast serves; else stop the other reader or set database.slot",
        ),
        ("unreserved", None) => Finding::warn(
            CHECK,
            format!("slot {name} is about to lose its WAL: it holds back {held} MB and nobody reads it"),
            format!("start `walcast serve`, or drop it: {drop_it}"),
        ),
        (_, None) => Finding::ok(CHECK, format!("slot {name} exists, waits to be read and holds back {held} MB of WAL")),
    }])
}

/// Tokens are judged by our clock and written by others'.
pub(super) async fn clock(client: &Client) -> Result<Finding, PgError> {
    let before = now();
    let row = one(client, "reading the server's clock", "select extract(epoch from clock_timestamp())::float8").await?;
    let (after, theirs) = (now(), row.get::<_, f64>(0));
    // Inside the time that the question took, nothing can be said.
    let skew = if theirs < before { before - theirs } else { (theirs - after).max(0.0) };
    Ok(match skew > 2.0 {
        false => Finding::ok("clock", "our clock and the server's agree"),
        true => Finding::warn(
            "clock",
            format!("our clock and the server's differ by {skew:.0} s: tokens and policies disagree about what has expired"),
            "let both machines follow the same time source (NTP)",
        ),
    })
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

pub(super) async fn one(client: &Client, doing: &'static str, sql: &str) -> Result<Row, PgError> {
    let rows = client.query_typed(sql, &[]).await.map_err(PgError::when(doing))?;
    rows.into_iter().next().ok_or_else(|| unexpected(doing))
}

fn unexpected(doing: &'static str) -> PgError {
    PgError::Unexpected { doing, what: "no row".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn an_unlimited_slot_is_warned_of() {
        let acknowledge = 256 * MIB as u64;
        assert_eq!(keep_size(-1, acknowledge).level, Level::Warn);
        assert_eq!(keep_size(100, acknowledge).level, Level::Warn);
        assert_eq!(keep_size(2560, acknowledge).level, Level::Ok);
    }
}
