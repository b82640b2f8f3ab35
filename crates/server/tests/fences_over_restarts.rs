//! P4, P5 and P6 when something ends: Walcast restarts, PostgreSQL is away, PostgreSQL crashes and forgets commits.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use support::{
    DEADLINE, Server, migrate,
    reads::{By, Reads},
};
use tokio_postgres::Client;
use walcast_testkit::{TestPostgres, wait};

const SCHEMA: &str = "create table items (id bigint primary key, version bigint not null);
    insert into items select i, 1 from generate_series(1, 100) i;
    grant select on items to service_role;";

const ITEM: &str = "-- name: item\n-- param: id bigint\nselect id, version from items where id = $1\n";

fn key(id: i64) -> String {
    format!("/cache/v1/items/{id}")
}

async fn version(client: &Client, id: i64) -> Result<i64> {
    Ok(client.query_one("select version from items where id = $1", &[&id]).await?.get(0))
}

async fn fill(reads: &Reads, client: &Client, id: i64) -> Result<String> {
    reads.fill(&key(id), &format!("items:id={id}"), async || Ok(version(client, id).await?.to_string())).await
}

/// Until the second tier has a row for each of so many keys.
async fn in_l2(client: &Client, rows: i64) -> Result<()> {
    wait::until(DEADLINE, format!("the second tier has {rows} rows"), async || {
        let counted = client.query_one("select count(*) from walcast.cache_entries", &[]).await;
        counted.is_ok_and(|row| row.get::<_, i64>(0) >= rows)
    })
    .await
}

#[tokio::test]
async fn p5_an_l2_entry_that_was_invalidated_before_restarts_is_never_answered_and_good_ones_stay() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["items"]).await?;
    let queries = tempfile::tempdir()?;
    std::fs::write(queries.path().join("item.sql"), ITEM)?;
    let dir = queries.path().to_string_lossy().into_owned();
    let settings = [("WALCAST_STREAM__ACKNOWLEDGE_AFTER", "1s"), ("WALCAST_QUERIES__DIR", dir.as_str())];
    let mut server = Server::start(&postgres, &settings).await?;
    let client = postgres.connect().await?;
    let reads = Reads::service(&server);
    for id in 1..=6 {
        ensure!(fill(&reads, &client, id).await? == "stored");
    }
    for id in 1..=2 {
        ensure!(reads.get(&format!("/query/v1/item?id={id}")).await?.status == 200);
    }
    in_l2(&client, 8).await?;
    let kept: i64 = client.query_one("select count(*) from walcast.cache_entries", &[]).await?.get(0);

    postgres.execute("update items set version = 2 where id in (1, 2)").await?;
    reads.delete(&key(3)).await?;
    let end: String = client.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
    wait::until(DEADLINE, "the slot has passed the commit", async || {
        let sql = format!("select 1 from pg_replication_slots where slot_name = 'walcast' and confirmed_flush_lsn > '{end}'");
        client.query(&sql, &[]).await.is_ok_and(|rows| rows.len() == 1)
    })
    .await?;
    // Nothing of it comes again from the stream. Only the checkpoint knows.
    for how in ["stopped", "stopped", "killed"] {
        if how == "killed" {
            server.kill9().await?;
            server.start_again().await?;
        } else {
            server.stop().await?;
            server = Server::start(&postgres, &settings).await?;
        }
        let reads = Reads::service(&server);
        // Control: the rows are still there, so it is the clock that judges.
        let rows: i64 = client.query_one("select count(*) from walcast.cache_entries", &[]).await?.get(0);
        ensure!(rows == kept, "{how}: {rows} rows of {kept}");
        for id in 1..=3 {
            let seen = reads.get(&key(id)).await?;
            ensure!(!seen.is_hit(), "{how}: invalidated before it: {seen:?}");
        }
        for id in 4..=6 {
            let seen = reads.get(&key(id)).await?;
            ensure!(seen.is_from_l2() && seen.body == "1", "{how}: a good entry is kept: {seen:?}");
        }
        ensure!(reads.get(&key(4)).await?.cache_status.ends_with("detail=l1"), "{how}: moved up");
    }
    let reads = Reads::service(&server);
    let seen = reads.get("/query/v1/item?id=1").await?;
    ensure!(!seen.is_hit() && seen.json()?[0]["version"] == 2, "{seen:?}");
    // An entry that came up from the second tier falls as any other.
    postgres.execute("update items set version = 2 where id = 4").await?;
    reads.heard().await?;
    ensure!(!reads.get(&key(4)).await?.is_hit());
    server.stop().await
}

#[tokio::test]
async fn p5_what_was_committed_while_walcast_was_down_ends_the_entries_of_before() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["items"]).await?;
    let mut server = Server::start(&postgres, &[]).await?;
    let client = postgres.connect().await?;
    let reads = Reads::service(&server);
    for id in 1..=2 {
        ensure!(fill(&reads, &client, id).await? == "stored");
    }
    let ticket = reads.get(&key(3)).await?;
    in_l2(&client, 2).await?;
    server.kill9().await?;
    postgres.execute("update items set version = 2 where id in (1, 3)").await?;
    server.start_again().await?;
    ensure!(!reads.get(&key(1)).await?.is_hit());
    let seen = reads.get(&key(2)).await?;
    ensure!(seen.is_from_l2() && seen.body == "1", "{seen:?}");
    let old = reads.put(&key(3), By::Ticket(ticket.ticket()?), "items:id=3", "1").await?;
    ensure!(old != "stored", "a ticket of the process before");
    server.stop().await
}

#[tokio::test]
async fn p5_a_change_of_rules_or_keys_while_walcast_was_down_ends_what_was_kept_under_the_old_ones() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    let schema = format!(
        "{SCHEMA} create table owners (id bigint primary key);
         create table pets (id bigint primary key, owner bigint references owners, name text);
         create view named as select id, owner, name from pets;
         insert into owners values (1), (2); insert into pets values (1, 1, 'Rex'), (2, 2, 'Tom');
         grant select on owners, pets, named to service_role;"
    );
    migrate(&postgres, &schema, &[]).await?;
    let queries = tempfile::tempdir()?;
    std::fs::write(
        queries.path().join("pets.sql"),
        "-- name: pets\n-- param: owner bigint\nselect name from named where owner = $1 order by name\n",
    )?;
    let dir = queries.path().to_string_lossy().into_owned();
    let mut server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &dir)]).await?;
    let reads = Reads::service(&server);
    let client = postgres.connect().await?;
    let path = "/query/v1/pets?owner=1";
    for (narrowed, change, then, expected) in [
        // The column that narrows is not raised any more.
        (true, "alter table pets drop constraint pets_owner_fkey", "update pets set name = 'Rexy' where id = 1", "Rexy"),
        (false, "create index by_owner on pets (owner)", "update pets set name = 'Rex' where id = 1", "Rex"),
        // It is raised under another name.
        (true, "alter table pets rename column owner to keeper", "update pets set name = 'Max' where id = 1", "Max"),
        // Another answer without any row's change.
        (true, "create or replace view named as select id, keeper as owner, upper(name) as name from pets", "select 1", "MAX"),
    ] {
        // Described, planned, settled: what is kept then is narrowed, and hangs on nothing else.
        postgres.execute("update pets set name = name where id = 2").await?;
        reads.heard().await?;
        ensure!(reads.get(path).await?.status == 200);
        reads.settled().await?;
        postgres.execute("update pets set name = name where id in (1, 2)").await?;
        reads.settled().await?;
        ensure!(reads.get(path).await?.status == 200);
        wait::until(DEADLINE, "the answer is kept", async || reads.get(path).await.is_ok_and(|seen| seen.is_fresh_hit())).await?;
        wait::until(DEADLINE, "the answer is in the second tier, narrowed where it can be", async || {
            let sql = "select 1 from walcast.cache_entries where ('pets' = any (tags)) <> $1";
            client.query(sql, &[&narrowed]).await.is_ok_and(|rows| rows.len() == 1)
        })
        .await?;
        server.kill9().await?;
        postgres.execute(change).await?;
        server.start_again().await?;
        postgres.execute(then).await?;
        reads.heard().await?;
        let seen = reads.get(path).await?;
        ensure!(seen.json()?[0]["name"] == expected, "after `{change}`: {seen:?}");
    }
    server.stop().await
}

#[tokio::test]
async fn p6_while_postgresql_is_away_cached_entries_are_marked_stale_and_afterwards_all_is_fresh_again() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["items"]).await?;
    let queries = tempfile::tempdir()?;
    std::fs::write(queries.path().join("item.sql"), ITEM)?;
    let dir = queries.path().to_string_lossy().into_owned();
    let server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &dir)]).await?;
    let reads = Reads::service(&server);
    {
        let client = postgres.connect().await?;
        ensure!(fill(&reads, &client, 1).await? == "stored" && fill(&reads, &client, 2).await? == "stored");
    }
    ensure!(reads.get("/query/v1/item?id=1").await?.status == 200);
    let position = reads.get("/query/v1/item?id=1").await?;
    ensure!(position.is_fresh_hit());

    postgres.stop().await?;
    server.wait_ready(false).await?;
    let began = Instant::now();
    let seen = reads.get(&key(1)).await?;
    ensure!(seen.status == 200 && seen.is_stale() && seen.body == "1", "answered, and marked: {seen:?}");
    let miss = reads.get(&key(50)).await?;
    ensure!(miss.status == 404 && miss.ticket.is_none(), "a miss, and no ticket: {miss:?}");
    let asked = reads.get_at_least(&key(1), &position.position).await?;
    ensure!(!asked.is_hit(), "nobody can vouch for a freshness that was asked for: {asked:?}");
    let seen = reads.get("/query/v1/item?id=1").await?;
    ensure!(seen.status == 503 && !seen.is_hit(), "rows under row security are never answered stale: {seen:?}");
    let problem = seen.json()?;
    for field in ["code", "title", "hint"] {
        ensure!(problem[field].as_str().is_some_and(|text| !text.is_empty()), "no {field}: {seen:?}");
    }
    ensure!(began.elapsed() < Duration::from_secs(20), "P6: it took {:?}", began.elapsed());

    postgres.start_again().await?;
    server.wait_ready(true).await?;
    let client = postgres.connect().await?;
    let seen = reads.get(&key(2)).await?;
    ensure!(!seen.is_stale() && (!seen.is_hit() || seen.body == "1"), "{seen:?}");
    client.batch_execute("update items set version = 2 where id = 1").await?;
    reads.heard().await?;
    ensure!(!reads.get(&key(1)).await?.is_hit());
    ensure!(fill(&reads, &client, 1).await? == "stored");
    let seen = reads.get(&key(1)).await?;
    ensure!(seen.is_fresh_hit() && seen.body == "2", "{seen:?}");
    let seen = reads.get("/query/v1/item?id=1").await?;
    ensure!(seen.status == 200 && seen.json()?[0]["version"] == 2, "{seen:?}");
    ensure!(reads.get("/query/v1/item?id=1").await?.is_fresh_hit());
    server.stop().await
}

/// The commit was visible, was read and cached, and then never was: `synchronous_commit = off` and a crash.
#[tokio::test]
async fn p5_a_value_from_a_commit_that_a_crash_lost_is_never_fresh_after_recovery() -> Result<()> {
    for _ in 1..=5 {
        if crash_loses_a_commit_that_was_cached(false).await? {
            return Ok(());
        }
    }
    bail!("five crashes, and the commit was never lost: the test proves nothing")
}

#[tokio::test]
async fn p5_the_same_holds_when_walcast_dies_with_postgresql() -> Result<()> {
    for _ in 1..=5 {
        if crash_loses_a_commit_that_was_cached(true).await? {
            return Ok(());
        }
    }
    bail!("five crashes, and the commit was never lost: the test proves nothing")
}

/// False if the commit survived.
async fn crash_loses_a_commit_that_was_cached(walcast_dies_too: bool) -> Result<bool> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["items"]).await?;
    let queries = tempfile::tempdir()?;
    std::fs::write(queries.path().join("item.sql"), ITEM)?;
    let dir = queries.path().to_string_lossy().into_owned();
    // The heartbeat comes back only when the WAL writer wakes, which will be long.
    let settings = [("WALCAST_CACHE__MAX_STALENESS", "60s"), ("WALCAST_QUERIES__DIR", dir.as_str())];
    let mut server = Server::start(&postgres, &settings).await?;
    let reads = Reads::service(&server);
    let client = postgres.connect().await?;
    client.batch_execute("alter system set wal_writer_delay = '10s'").await?;
    client.batch_execute("select pg_reload_conf(); set synchronous_commit = off").await?;
    wait::until(DEADLINE, "the WAL writer is slow", async || {
        client.query_one("show wal_writer_delay", &[]).await.is_ok_and(|row| row.get::<_, &str>(0) == "10s")
    })
    .await?;
    ensure!(fill(&reads, &client, 2).await? == "stored");

    client.batch_execute("update items set version = 2 where id = 1").await?;
    ensure!(fill(&reads, &client, 1).await? == "stored");
    ensure!(reads.get(&key(1)).await?.body == "2");
    let seen = reads.get("/query/v1/item?id=1").await?;
    ensure!(seen.json()?[0]["version"] == 2, "{seen:?}");
    let ticket = reads.get(&key(3)).await?;
    postgres.kill9().await?;
    if walcast_dies_too {
        server.kill9().await?;
    }
    drop(client);
    postgres.start_again().await?;
    let client = postgres.connect().await?;
    if version(&client, 1).await? != 1 {
        return Ok(false);
    }
    if walcast_dies_too {
        server.start_again().await?;
    }
    // From the first moment on, not only once all is well.
    let until = Instant::now() + DEADLINE;
    let mut other_is_fresh = false;
    while !other_is_fresh && Instant::now() < until {
        let seen = reads.get(&key(1)).await?;
        ensure!(!(seen.is_fresh_hit() && seen.body == "2"), "fresh, from a commit that never was: {seen:?}");
        let seen = reads.get("/query/v1/item?id=1").await?;
        ensure!(seen.status != 200 || seen.json()?[0]["version"] == 1, "from a commit that never was: {seen:?}");
        other_is_fresh = !reads.get(&key(2)).await?.is_stale() && server.wait_ready(true).await.is_ok();
    }
    // Nothing of before the crash is fresh, tickets neither: transaction ids are used again.
    for id in 1..=2 {
        let seen = reads.get(&key(id)).await?;
        ensure!(!seen.is_hit(), "{seen:?}");
    }
    let stored = reads.put(&key(3), By::Ticket(ticket.ticket()?), "items:id=3", "1").await?;
    ensure!(stored != "stored", "a ticket of before the crash");
    ensure!(fill(&reads, &client, 1).await? == "stored");
    client.batch_execute("update items set version = 5 where id = 1").await?;
    reads.heard().await?;
    ensure!(!reads.get(&key(1)).await?.is_hit());
    ensure!(fill(&reads, &client, 1).await? == "stored" && reads.get(&key(1)).await?.body == "5");
    server.stop().await?;
    Ok(true)
}
