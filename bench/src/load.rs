//! A backlog of changes, written while nobody drains it, and the slots from which it is drained again and again.
//!
//! A drain moves its slot on. So the slots are copied from one that stays before the load, and Walcast's checkpoint
//! is put back to what it was there: each drain finds what the first one would have found.

use anyhow::Context;
use tokio_postgres::Client;
use walcast_model::{Lsn, Position};
use walcast_testkit::wait;

use crate::stage::{DEADLINE, Stage};

/// What `serve` reads from, by its default setting.
const WALCAST_SLOT: &str = "walcast";
pub const PLAIN_SLOT: &str = "bench_plain";
const BASE_SLOT: &str = "bench_base";
/// Vitals go round among so many patients.
pub const PATIENTS: u32 = 100;

const WRITER: &str = "
create procedure write_vitals(next int, transactions int, rows_each int) language plpgsql as $$
begin
  for i in 1..transactions loop
    insert into vitals (patient_id, kind, value)
      select n % 100, 'heart_rate', 60 + n % 60 from generate_series(next, next + rows_each - 1) n;
    next := next + rows_each;
    commit;
  end loop;
end $$;";

#[derive(Debug, Clone, Copy)]
pub struct Backlog {
    pub transactions: u32,
    pub rows_each: u32,
}

impl Backlog {
    pub fn changes(&self) -> u64 {
        u64::from(self.transactions) * u64::from(self.rows_each)
    }

    pub fn name(&self) -> String {
        match self.rows_each {
            1 => format!("{} transactions of 1 row", self.transactions),
            rows => format!("{} transactions of {rows} rows", self.transactions),
        }
    }
}

/// A backlog as it lies in the WAL.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// Where a subscriber stands who has heard everything before.
    pub cursor: Position,
    /// At or before the last transaction's commit, and after every other's.
    pub last: Lsn,
    pub end: Lsn,
}

/// Makes the slots, then writes.
pub async fn write(stage: &Stage, client: &Client, backlog: Backlog) -> anyhow::Result<Written> {
    let mut first = stage.serve(&[])?;
    first.ready().await?;
    let epoch = first.position().await?.epoch;
    first.stop().await?;
    slot_is_free(client, WALCAST_SLOT).await?;
    client.batch_execute(WRITER).await?;
    copy_slot(client, WALCAST_SLOT, BASE_SLOT).await?;
    let keep =
        "create table public.bench_sentinel as table walcast.sentinel; create table public.bench_clock as table walcast.clock";
    client.batch_execute(keep).await.context("keeping the checkpoint")?;
    let before = lsn(client, "pg_current_wal_insert_lsn()").await?;
    client.batch_execute("set synchronous_commit = off").await?;
    let Backlog { transactions, rows_each } = backlog;
    client.batch_execute(&format!("call write_vitals(0, {}, {rows_each})", transactions - 1)).await?;
    let last = lsn(client, "pg_current_wal_insert_lsn()").await?;
    client.batch_execute("set synchronous_commit = on").await?;
    client.batch_execute(&format!("call write_vitals({}, 1, {rows_each})", (transactions - 1) * rows_each)).await?;
    let end = lsn(client, "pg_current_wal_flush_lsn()").await?;
    // Or the checkpoint after the load falls into somebody's drain.
    client.batch_execute("checkpoint").await?;
    Ok(Written { cursor: Position { epoch, lsn: before, index: 0 }, last, end })
}

/// Both sides stand before the backlog again.
pub async fn rewind(client: &Client) -> anyhow::Result<()> {
    for slot in [WALCAST_SLOT, PLAIN_SLOT] {
        slot_is_free(client, slot).await?;
        let sql = "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1";
        client.execute(sql, &[&slot]).await.with_context(|| format!("dropping slot {slot}"))?;
        copy_slot(client, BASE_SLOT, slot).await?;
    }
    let restore = "delete from walcast.sentinel; insert into walcast.sentinel select * from public.bench_sentinel; \
                   truncate walcast.clock; insert into walcast.clock select * from public.bench_clock";
    client.batch_execute(restore).await.context("putting the checkpoint back")
}

/// CPU seconds are read of the process that sends to Walcast.
pub async fn walsender(client: &Client) -> anyhow::Result<Option<u32>> {
    let sql = "select active_pid from pg_replication_slots where slot_name = $1";
    let row = client.query_opt(sql, &[&WALCAST_SLOT]).await?;
    Ok(row.and_then(|row| row.get::<_, Option<i32>>(0)).map(|pid| pid as u32))
}

/// A walsender outlives its client for a moment.
async fn slot_is_free(client: &Client, slot: &str) -> anyhow::Result<()> {
    let sql = "select 1 from pg_replication_slots where slot_name = $1 and active";
    let free = async || client.query_opt(sql, &[&slot]).await.is_ok_and(|row| row.is_none());
    wait::until(DEADLINE, format!("slot {slot} is free"), free).await
}

async fn copy_slot(client: &Client, from: &str, to: &str) -> anyhow::Result<()> {
    let copied = client.execute("select pg_copy_logical_replication_slot($1, $2)", &[&from, &to]).await;
    copied.with_context(|| format!("copying slot {from} to {to}")).map(|_| ())
}

async fn lsn(client: &Client, function: &str) -> anyhow::Result<Lsn> {
    let row = client.query_one(&format!("select {function}::text"), &[]).await?;
    row.get::<_, &str>(0).parse().map_err(|error| anyhow::anyhow!("{function}: {error}"))
}
