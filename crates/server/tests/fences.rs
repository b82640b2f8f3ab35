//! P4 and P5 at the narrow places: commits that are streamed before they are visible, flights that began too early,
//! fills from inside a transaction, and freshness that a reader asks for.

mod support;

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use support::{
    DEADLINE, Server, migrate,
    queries::QueryDir,
    reads::{By, Reads},
    unseen::{Unseen, standby_never_answers},
};
use tokio_postgres::Client;
use walcast_testkit::{SseStream, TestPostgres, wait};

const SCHEMA: &str = "create table items (id bigint primary key, version bigint not null);
    create table gate (id bigint primary key, open boolean);
    insert into items select i, 1 from generate_series(1, 100) i;
    insert into gate values (1, true);
    create table lists (id bigint primary key);
    grant select on items, gate, lists to service_role;";

const ITEM: &str = "-- param: id bigint\nselect id, version from items where id = $1\n";
/// Cannot be answered while somebody holds the gate; by then its snapshot has been taken.
const GATED: &str = "-- param: id bigint\nselect i.id, i.version from items i, gate g where i.id = $1 and g.open\n";

const AT_THE_GATE: &str = "select 1 from pg_locks where relation = 'gate'::regclass and not granted";

struct House {
    postgres: TestPostgres,
    server: Server,
    reads: Reads,
    _queries: QueryDir,
}

impl House {
    async fn open() -> Result<House> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, SCHEMA, &["items"]).await?;
        let queries = QueryDir::new(&[("item", ITEM), ("gated", GATED)])?;
        let server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &queries.setting())]).await?;
        let reads = Reads::service(&server);
        // Described already: a table in doubt whose commit does not settle would let everything of it fall.
        postgres.execute("update items set version = version where id = 1").await?;
        reads.settled().await?;
        Ok(House { postgres, server, reads, _queries: queries })
    }

    /// Its own commits wait for nobody.
    async fn local(&self) -> Result<Client> {
        let client = self.postgres.connect().await?;
        client.batch_execute("set synchronous_commit = local").await?;
        Ok(client)
    }

    async fn version(&self, id: i64) -> Result<i64> {
        Ok(self.local().await?.query_one("select version from items where id = $1", &[&id]).await?.get(0))
    }

    async fn fill(&self, id: i64) -> Result<String> {
        self.reads.fill(&key(id), &format!("items:id={id}"), async || Ok(self.version(id).await?.to_string())).await
    }

    async fn listen(&self) -> Result<SseStream> {
        let token = self.server.token("service_role", None);
        let mut events = SseStream::open(&format!("{}/sse/v1/changes?table=items", self.server.url), Some(&token), None).await?;
        ensure!(events.next(DEADLINE).await?.event == "live");
        Ok(events)
    }
}

fn key(id: i64) -> String {
    format!("/cache/v1/items/{id}")
}

/// The first column named `version` of a query's answer.
fn version(seen: &support::reads::Seen) -> Result<i64> {
    seen.json()?[0]["version"].as_i64().ok_or_else(|| anyhow::anyhow!("no version in {seen:?}"))
}

#[tokio::test]
async fn p5_a_fill_that_read_while_a_commit_was_streamed_but_invisible_is_never_fresh_afterwards() -> Result<()> {
    let house = House::open().await?;
    standby_never_answers(&house.postgres).await?;
    ensure!(house.fill(1).await? == "stored");
    // Filled before the commit, and a ticket from before it.
    let early = house.reads.get(&key(2)).await?;
    let waiting = Unseen::commit(&house.postgres, "update items set version = 2 where id in (1, 2, 3)").await?;
    house.reads.heard().await?;

    // Control: the window is real. Whoever reads now gets the old row, though the commit has been heard.
    ensure!(house.version(1).await? == 1, "the commit is visible: this test forces no window");
    ensure!(!house.reads.get(&key(1)).await?.is_hit(), "heard of, so invalidated, also before it settles");
    ensure!(house.fill(1).await? == "touched");
    let old = house.version(2).await?.to_string();
    ensure!(house.reads.put(&key(2), By::Ticket(early.ticket()?), "items:id=2", &old).await? == "touched");
    // A ticket of the window, put after it.
    let late = house.reads.get(&key(3)).await?;
    let old = house.version(3).await?.to_string();
    // A query answers what PostgreSQL shows, and keeps nothing.
    let seen = house.reads.get("/query/v1/item?id=1").await?;
    ensure!(version(&seen)? == 1 && seen.cache_status.contains("touched"), "{seen:?}");

    let mut events = house.listen().await?;
    waiting.settle().await?;
    for _ in 0..3 {
        // A commit that is still settling reaches those who came meanwhile.
        ensure!(events.next(DEADLINE).await?.event == "change");
    }
    ensure!(house.reads.put(&key(3), By::Ticket(late.ticket()?), "items:id=3", &old).await? == "touched");
    for id in 1..=3 {
        ensure!(!house.reads.get(&key(id)).await?.is_hit(), "item {id}");
        ensure!(house.fill(id).await? == "stored", "item {id}");
        ensure!(house.reads.get(&key(id)).await?.body == "2", "item {id}");
    }
    ensure!(version(&house.reads.get("/query/v1/item?id=1").await?)? == 2);
    ensure!(house.reads.get("/query/v1/item?id=1").await?.is_fresh_hit());
    house.server.stop().await
}

#[tokio::test]
async fn p4_nobody_is_told_of_a_commit_before_a_reader_can_find_it() -> Result<()> {
    let house = House::open().await?;
    standby_never_answers(&house.postgres).await?;
    let mut events = house.listen().await?;
    let waiting = Unseen::commit(&house.postgres, "update items set version = 2 where id = 1").await?;
    house.reads.heard().await?;
    // Commits behind it wait too: order is order.
    house.local().await?.batch_execute("update items set version = 2 where id = 2").await?;
    house.reads.heard().await?;
    ensure!(events.next(Duration::from_millis(500)).await.is_err(), "told of what no reader can find");
    waiting.settle().await?;
    for id in [1, 2] {
        let change = events.next(DEADLINE).await?.json()?;
        ensure!(change["record"]["id"] == id && house.version(id).await? == 2, "{change}");
    }
    house.server.stop().await
}

#[tokio::test]
async fn p4_a_reader_who_was_told_of_a_commit_does_not_share_a_flight_that_began_before_it() -> Result<()> {
    let house = House::open().await?;
    let path = "/query/v1/gated?id=7";
    // The stream has described the table and the plan is made: from here on nobody waits at the gate but to compute.
    house.postgres.execute("update items set version = 2 where id = 50").await?;
    house.reads.settled().await?;
    ensure!(house.reads.get("/query/v1/gated?id=8").await?.status == 200, "the plan is made");
    let mut events = house.listen().await?;
    let gatekeeper = house.postgres.connect().await?;
    gatekeeper.batch_execute("begin; lock table gate in access exclusive mode").await?;
    let waiting = async |count: usize| {
        let looker = house.postgres.connect().await?;
        wait::until(DEADLINE, format!("{count} queries wait at the gate"), async || {
            looker.query(AT_THE_GATE, &[]).await.is_ok_and(|rows| rows.len() >= count)
        })
        .await
    };
    let ask = || {
        let reads = house.reads.clone();
        tokio::spawn(async move { reads.get(path).await })
    };
    let (first, joined) = (ask(), ask());
    waiting(1).await?;
    house.postgres.execute("update items set version = 2 where id = 7").await?;
    ensure!(events.next(DEADLINE).await?.event == "change");
    let told: Vec<_> = (0..4).map(|_| ask()).collect();
    wait::until(DEADLINE, "all of them are in the flight", async || {
        let metrics = house.reads.get("/metrics").await.map(|seen| seen.body).unwrap_or_default();
        metrics.lines().any(|line| line == "walcast_cache_joins_total 5")
    })
    .await?;
    let looker = house.postgres.connect().await?;
    let first_flight = looker.query(AT_THE_GATE, &[]).await?.len();
    gatekeeper.batch_execute("commit").await?;

    // Controls: it was one flight for all, and it began before the commit.
    ensure!(first_flight == 1, "{first_flight} queries waited at the gate: nobody joined");
    ensure!(version(&first.await??)? == 1, "the flight began too late to prove anything");
    let _ = joined.await??;
    for seen in told {
        let seen = seen.await??;
        ensure!(version(&seen)? == 2, "told of version 2, then met {seen:?}");
    }
    ensure!(version(&house.reads.get(path).await?)? == 2);
    house.server.stop().await
}

#[tokio::test]
async fn p5_a_fill_from_inside_a_transaction_that_goes_on_to_change_the_row_does_not_outlive_its_commit() -> Result<()> {
    let house = House::open().await?;
    // (id, the transaction has written when the ticket is taken, it reads what it wrote itself)
    for (id, wrote_before_ticket, reads_own) in [(1, false, false), (2, false, true), (3, true, true)] {
        let writer = house.postgres.connect().await?;
        writer.batch_execute("begin").await?;
        let write = format!("update items set version = 2 where id = {id}");
        if wrote_before_ticket {
            writer.batch_execute(&write).await?;
        }
        let miss = house.reads.get(&key(id)).await?;
        if reads_own && !wrote_before_ticket {
            writer.batch_execute(&write).await?;
        }
        let read: i64 = writer.query_one("select version from items where id = $1", &[&id]).await?.get(0);
        ensure!(read == if reads_own { 2 } else { 1 });
        let stored = house.reads.put(&key(id), By::Ticket(miss.ticket()?), &format!("items:id={id}"), &read.to_string()).await?;
        if !reads_own {
            ensure!(stored == "stored", "nothing was committed yet: {stored}");
            writer.batch_execute(&write).await?;
        }
        writer.batch_execute("update items set version = 3 where id = 50; commit").await?;
        house.reads.heard().await?;
        let seen = house.reads.get(&key(id)).await?;
        ensure!(!seen.is_hit(), "case {id}: {seen:?}");
    }
    house.server.stop().await
}

#[tokio::test]
async fn p4_and_p5_after_its_own_write_an_application_puts_and_asks_by_transaction_id() -> Result<()> {
    let house = House::open().await?;
    let client = house.postgres.connect().await?;
    let write = async |sql: &str| -> Result<u64> {
        client.batch_execute(&format!("begin; {sql}")).await?;
        let xid: String = client.query_one("select pg_current_xact_id()::text", &[]).await?.get(0);
        client.batch_execute("commit").await?;
        Ok(xid.parse()?)
    };
    ensure!(house.fill(1).await? == "stored" && house.fill(2).await? == "stored");
    let before = house.reads.get(&key(1)).await?.position;
    let xid = write("update items set version = 2 where id = 1").await?;
    ensure!(house.reads.put(&key(1), By::Written(xid), "items:id=1", "2").await? == "stored");
    ensure!(house.reads.get(&key(1)).await?.body == "2");
    // Its own write answers a read that asks for it.
    let seen = house.reads.get_at_least(&key(1), &xid.to_string()).await?;
    ensure!(seen.is_fresh_hit() && seen.body == "2", "{seen:?}");
    // An entry that is not known to contain the transaction is no answer for who asks for it.
    let seen = house.reads.get_at_least(&key(2), &xid.to_string()).await?;
    ensure!(!seen.is_hit() && seen.cache_status.contains("behind"), "{seen:?}");
    // Its miss carries the ticket for one that is.
    ensure!(house.reads.put(&key(2), By::Ticket(seen.ticket()?), "items:id=2", "1").await? == "stored");
    ensure!(house.reads.get_at_least(&key(2), &xid.to_string()).await?.is_fresh_hit());
    // A later write ends it as any other.
    let later = write("update items set version = 3 where id = 1").await?;
    house.reads.heard().await?;
    ensure!(!house.reads.get(&key(1)).await?.is_hit());
    // An older write of ours does not bring it back.
    ensure!(
        house.reads.put(&key(1), By::Written(xid), "items:id=1", "2").await? != "stored"
            || !house.reads.get(&key(1)).await?.is_hit()
    );
    // A transaction that did not touch what the value is made of says nothing about it.
    let refused = house.reads.put(&key(3), By::Written(later), "items:id=1, items:id=3", "1").await?;
    ensure!(refused == "unknown_transaction", "{refused}");

    // Of a whole table one transaction can vouch for nothing: others may have written it unseen.
    let refused = house.reads.put(&key(4), By::Written(later), "items", "[]").await?;
    ensure!(refused == "ticket_required", "{refused}");

    // By position: what was invalidated up to there, and what untouched entries are known to contain.
    let position = house.reads.delete(&key(90)).await?;
    let seen = house.reads.get_at_least(&key(2), &position).await?;
    ensure!(seen.is_fresh_hit(), "not touched up to the position: {seen:?}");
    ensure!(house.reads.get_at_least(&key(2), &before).await?.is_fresh_hit());
    let seen = house.reads.get_at_least("/query/v1/item?id=1", &position).await?;
    ensure!(version(&seen)? == 3, "{seen:?}");
    let seen = house.reads.get_at_least("/query/v1/item?id=1", &later.to_string()).await?;
    ensure!(version(&seen)? == 3, "{seen:?}");
    // A position of another epoch is none.
    let foreign = format!("00000000/{}", position.split_once('/').map_or("", |(_, rest)| rest));
    ensure!(!house.reads.get_at_least(&key(2), &foreign).await?.is_hit());
    ensure!(house.reads.get_at_least("/query/v1/item?id=1", &foreign).await?.status == 409);
    house.server.stop().await
}

#[tokio::test]
async fn p4_invalidation_by_hand_and_truncate_hold_when_they_answer_and_touch_nothing_else() -> Result<()> {
    let house = House::open().await?;
    let refill = async || -> Result<()> {
        for id in 1..=4 {
            if !house.reads.get(&key(id)).await?.is_hit() {
                let tags = format!("items:id={id}, shelf:{}", id % 2);
                let stored = house.reads.fill(&key(id), &tags, async || Ok(house.version(id).await?.to_string())).await?;
                ensure!(stored == "stored", "item {id}: {stored}");
            }
        }
        Ok(())
    };
    let left = async || -> Result<Vec<i64>> {
        let mut left = Vec::new();
        for id in 1..=4 {
            if house.reads.get(&key(id)).await?.is_hit() {
                left.push(id);
            }
        }
        Ok(left)
    };
    refill().await?;
    house.reads.delete(&key(1)).await?;
    ensure!(left().await? == [2, 3, 4]);
    refill().await?;
    for (what, expected) in [
        (json!({ "tags": ["shelf:1"] }), vec![2, 4]),
        (json!({ "tags": ["items:id=2"] }), vec![1, 3, 4]),
        (json!({ "namespace": "items", "keys": ["3", "4"] }), vec![1, 2]),
        (json!({ "namespace": "others" }), vec![1, 2, 3, 4]),
        (json!({ "namespace": "items" }), vec![]),
    ] {
        house.reads.invalidate(what.clone()).await?;
        let left = left().await?;
        ensure!(left == expected, "{what}: {left:?} are left");
        refill().await?;
    }
    // A ticket from before an invalidation fills nothing after it.
    let miss = house.reads.get(&key(9)).await?;
    house.reads.delete(&key(9)).await?;
    ensure!(house.reads.put(&key(9), By::Ticket(miss.ticket()?), "items:id=9", "1").await? == "touched");

    house.reads.fill("/cache/v1/lists/all", "lists", async || Ok("[]".into())).await?;
    ensure!(house.reads.get("/query/v1/item?id=2").await?.status == 200);
    ensure!(house.reads.get("/query/v1/item?id=2").await?.is_hit());
    house.postgres.execute("truncate items").await?;
    house.reads.heard().await?;
    ensure!(left().await?.is_empty(), "TRUNCATE ends every row's entries");
    ensure!(house.reads.get("/cache/v1/lists/all").await?.is_hit(), "another table's stay");
    let seen = house.reads.get("/query/v1/item?id=2").await?;
    ensure!(seen.body == "[]", "{seen:?}");
    house.server.stop().await
}

#[tokio::test]
async fn p5_a_tag_that_no_commit_would_raise_is_refused_however_it_is_spelled() -> Result<()> {
    let house = House::open().await?;
    house.postgres.execute("create table unheard (id bigint primary key)").await?;
    for tags in [
        "items:version=1",
        "unheard",
        "unheard:id=1",
        "public.items:id=1",
        "public.items",
        "items:id=01",
        "items:id= 1",
        "items:id=+1",
        "items:id=x",
    ] {
        let answer = house.reads.fill(&key(1), tags, async || Ok("1".into())).await?;
        let seen = house.reads.get(&key(1)).await?;
        ensure!(answer == "untracked_tag" && !seen.is_hit(), "`{tags}`: {answer}");
    }
    // A tag of the application's own is not a table's.
    ensure!(house.reads.fill(&key(1), "reports, shelf:3, items:id=1", async || Ok("1".into())).await? == "stored");
    house.server.stop().await
}
