//! P4 and P5 while tables, indexes, policies and privileges change under a running Walcast.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use support::{
    DEADLINE, Server, migrate,
    reads::{By, Reads, Seen},
};
use walcast_testkit::{TestPostgres, wait};

const SCHEMA: &str = "create table pets (id bigint primary key, owner bigint not null, kind text not null, name text not null);
    alter table pets replica identity full;
    insert into pets select i, i % 10, 'cat', 'pet ' || i from generate_series(1, 100) i;
    create table secrets (id bigint primary key, team text not null, body text not null);
    alter table secrets enable row level security;
    create policy by_team on secrets for select to authenticated using (team = auth.jwt() ->> 'team');
    insert into secrets values (1, 'red', 'r'), (2, 'blue', 'b');
    grant select on pets, secrets to authenticated, service_role;";

const PETS: &str = "-- name: pets\n-- param: owner bigint\nselect id, name from pets where owner = $1 order by id\n";
const SECRETS: &str = "-- name: secrets\nselect id, body from secrets order by id\n";

struct House {
    postgres: TestPostgres,
    server: Server,
    reads: Reads,
    _queries: tempfile::TempDir,
}

impl House {
    async fn open() -> Result<House> {
        House::with(&[]).await
    }

    async fn with(settings: &[(&str, &str)]) -> Result<House> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, SCHEMA, &["pets"]).await?;
        let queries = tempfile::tempdir()?;
        std::fs::write(queries.path().join("pets.sql"), PETS)?;
        std::fs::write(queries.path().join("secrets.sql"), SECRETS)?;
        let dir = queries.path().to_string_lossy().into_owned();
        let settings: Vec<_> = settings.iter().copied().chain([("WALCAST_QUERIES__DIR", dir.as_str())]).collect();
        let server = Server::start(&postgres, &settings).await?;
        let reads = Reads::service(&server);
        Ok(House { postgres, server, reads, _queries: queries })
    }

    /// Asks until the answer is kept, and hands it over.
    async fn kept(&self, reads: &Reads, path: &str) -> Result<Seen> {
        wait::until_some(DEADLINE, format!("{path} is kept"), async || reads.get(path).await.ok().filter(Seen::is_fresh_hit))
            .await
    }

    async fn pets(&self, owner: i64) -> Result<Seen> {
        self.reads.get(&format!("/query/v1/pets?owner={owner}")).await
    }

    /// What PostgreSQL answers now.
    async fn truth(&self, owner: i64) -> Result<Value> {
        let sql = "select coalesce(json_agg(json_build_object('id', id, 'name', name) order by id), '[]')::text from pets where owner = $1::bigint";
        let text: String = self.postgres.connect().await?.query_one(sql, &[&owner]).await?.get(0);
        Ok(serde_json::from_str(&text)?)
    }
}

#[tokio::test]
async fn p4_a_query_narrowed_by_a_column_that_was_indexed_in_mid_stream_stays_fresh() -> Result<()> {
    let house = House::open().await?;
    // The stream describes the table while `owner` is in no index, and the query is planned so.
    house.postgres.execute("update pets set name = 'early' where id = 1").await?;
    house.kept(&house.reads, "/query/v1/pets?owner=1").await?;
    let narrowed = async || -> Result<bool> {
        // A write to another owner's pet leaves the answer exactly if it was narrowed.
        house.kept(&house.reads, "/query/v1/pets?owner=1").await?;
        house.postgres.execute("update pets set name = name || '.' where owner = 2 and id = 2").await?;
        house.reads.heard().await?;
        Ok(house.pets(1).await?.is_hit())
    };
    ensure!(!narrowed().await?, "control: not narrowed before the index is there");

    for (ddl, narrows) in [
        ("create index by_owner on pets (owner)", true),
        ("drop index by_owner", false),
        ("create index concurrently by_owner on pets (owner)", true),
        ("alter table pets alter column owner type numeric", false),
        ("alter table pets alter column owner type bigint", true),
        ("drop index by_owner", false),
    ] {
        house.kept(&house.reads, "/query/v1/pets?owner=1").await?;
        house.postgres.execute(ddl).await?;
        // At once, before anything has told anybody: the answer kept before, and one that is planned after.
        for (owner, id) in [(1, 1), (3, 3), (1, 11), (4, 4)] {
            house.pets(owner).await?;
            let name = format!("after {ddl} {id}");
            house.postgres.execute(&format!("update pets set name = '{name}' where id = {id}")).await?;
            house.reads.heard().await?;
            let seen = house.pets(owner).await?;
            ensure!(seen.json()? == house.truth(owner).await?, "after `{ddl}`: {seen:?}");
        }
        // A row that moves leaves one owner's answer and enters another's.
        house.kept(&house.reads, "/query/v1/pets?owner=1").await?;
        house.kept(&house.reads, "/query/v1/pets?owner=5").await?;
        house.postgres.execute("update pets set owner = 6 - owner where id in (1, 5)").await?;
        house.reads.heard().await?;
        for owner in [1, 5] {
            let seen = house.pets(owner).await?;
            ensure!(seen.json()? == house.truth(owner).await?, "after `{ddl}` and a move: {seen:?}");
        }
        // Narrowed at last: within the rounds in which every second the catalog is asked.
        let until = Instant::now() + Duration::from_secs(10);
        while narrowed().await? != narrows {
            ensure!(Instant::now() < until, "after `{ddl}` it should be narrowed: {narrows}");
        }
    }
    house.server.stop().await
}

#[tokio::test]
async fn p5_tags_of_a_column_are_taken_from_applications_only_while_commits_raise_them() -> Result<()> {
    let house = House::open().await?;
    let key = "/cache/v1/pets/of-1";
    let fill = async || house.reads.fill(key, "pets:owner=1", async || Ok(house.truth(1).await?.to_string())).await;
    ensure!(fill().await? == "untracked_tag");
    house.postgres.execute("create index by_owner on pets (owner); update pets set name = 'a' where id = 1").await?;
    house.reads.heard().await?;
    ensure!(fill().await? == "stored");
    house.postgres.execute("update pets set name = 'b' where id = 1").await?;
    house.reads.heard().await?;
    ensure!(!house.reads.get(key).await?.is_hit());
    ensure!(fill().await? == "stored");
    // Dropped: with the table's next change nothing that hung on the column is left, and nothing new is taken.
    house.postgres.execute("drop index by_owner").await?;
    house.postgres.execute("update pets set name = 'c' where id = 1").await?;
    house.reads.heard().await?;
    ensure!(!house.reads.get(key).await?.is_hit());
    ensure!(fill().await? == "untracked_tag", "remembered from before the index was dropped");
    // A column that PostgreSQL computes is not in the stream.
    house
        .postgres
        .execute("alter table pets add twice bigint generated always as (owner * 2) stored; create index on pets (twice)")
        .await?;
    house.postgres.execute("update pets set name = 'd' where id = 1").await?;
    house.reads.heard().await?;
    let answer = house.reads.fill(key, "pets:twice=2", async || Ok("x".into())).await?;
    ensure!(answer == "untracked_tag", "{answer}");
    house.server.stop().await
}

/// An index that is being built shows in the catalog while a commit from before it is streamed and not yet visible.
#[tokio::test]
async fn p5_a_query_planned_by_an_index_under_construction_keeps_nothing_that_lacks_an_older_commit() -> Result<()> {
    let house = House::open().await?;
    let looker = house.postgres.connect().await?;
    looker.batch_execute("set synchronous_commit = local; update pets set name = 'early' where id = 2").await?;
    house.postgres.execute("alter system set synchronous_standby_names = 'nobody'").await?;
    looker.batch_execute("select pg_reload_conf()").await?;

    let writer = house.postgres.connect().await?;
    let cancel = writer.cancel_token();
    let commit = tokio::spawn(async move { writer.batch_execute("update pets set name = 'new' where id = 1").await });
    let sees = async |what: &str, sql: &str| {
        wait::until(DEADLINE, what, async || looker.query(sql, &[]).await.is_ok_and(|rows| !rows.is_empty())).await
    };
    sees("the commit waits for its standby", "select from pg_stat_activity where wait_event = 'SyncRep'").await?;
    house.reads.heard().await?;
    let builder = house.postgres.connect().await?;
    builder.batch_execute("set synchronous_commit = local").await?;
    let build = tokio::spawn(async move { builder.batch_execute("create index concurrently by_owner on pets (owner)").await });
    sees("the index shows", "select from pg_class where relname = 'by_owner'").await?;
    // Planned for the first time now, before the catalog's turn comes round.
    let old = house.truth(1).await?;
    let seen = house.pets(1).await?;
    ensure!(seen.json()? == old, "control: the commit is not visible yet: {seen:?}");
    cancel.cancel_query(tokio_postgres::NoTls).await?;
    commit.await??;
    let seen = house.pets(1).await?;
    ensure!(house.truth(1).await? != old && seen.json()? == house.truth(1).await?, "{seen:?}");
    build.await??;
    house.server.stop().await
}

/// The stream has said nothing of the table yet when its columns lose their tags.
#[tokio::test]
async fn p4_entries_of_a_quiet_table_fall_with_its_first_change_though_their_column_is_raised_no_more() -> Result<()> {
    for ddl in [
        "drop index by_owner",
        "alter table pets rename owner to keeper",
        "alter table pets alter owner type numeric",
        "alter table pets rename to animals",
    ] {
        let house = House::open().await?;
        house.postgres.execute("create index by_owner on pets (owner)").await?;
        // A process that finds the index there when it starts, and hears of no change.
        let House { postgres, server, _queries, .. } = house;
        server.stop().await?;
        let dir = _queries.path().to_string_lossy().into_owned();
        let server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &dir)]).await?;
        let reads = Reads::service(&server);
        let key = "/cache/v1/pets/of-1";
        ensure!(reads.fill(key, "pets:owner=1", async || Ok("old".into())).await? == "stored");
        let query = "/query/v1/pets?owner=1";
        reads.get(query).await?;
        ensure!(reads.get(query).await?.is_fresh_hit() && reads.get(key).await?.is_fresh_hit());

        let table = if ddl.contains("to animals") { "animals" } else { "pets" };
        postgres.execute(&format!("{ddl}; update {table} set name = 'new' where id = 1")).await?;
        reads.heard().await?;
        ensure!(!reads.get(key).await?.is_hit(), "after `{ddl}`: an application's entry stayed");
        let seen = reads.get(query).await?;
        ensure!(!seen.is_hit(), "after `{ddl}`: a query's answer stayed: {seen:?}");
        server.stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn p5_a_fill_begun_before_the_table_was_redefined_is_not_stored_after_it() -> Result<()> {
    let house = House::open().await?;
    house.postgres.execute("update pets set name = 'y' where id = 2").await?;
    house.reads.heard().await?;
    let miss = house.reads.get("/cache/v1/pets/1").await?;
    house.postgres.execute("alter table pets add born date; update pets set name = 'z' where id = 2").await?;
    house.reads.heard().await?;
    let stored = house.reads.put("/cache/v1/pets/1", By::Ticket(miss.ticket()?), "pets:id=1", "old").await?;
    ensure!(stored == "touched", "{stored}");
    house.server.stop().await
}

#[tokio::test]
async fn p3_and_p4_a_change_of_policy_or_privilege_retires_cached_answers_within_a_second_and_with_the_next_change() -> Result<()>
{
    let house = House::open().await?;
    let claims = serde_json::json!({ "team": "red" });
    let token = walcast_testkit::jwt(support::SECRET, "authenticated", Some("ada"), 3600, claims);
    let ada = Reads::with_token(&house.server, token);
    let path = "/query/v1/secrets";
    let bodies = |seen: &Seen| -> String {
        let rows = seen.json().ok().and_then(|json| json.as_array().cloned()).unwrap_or_default();
        rows.iter().filter_map(|row| row["body"].as_str()).collect()
    };
    let deny = "alter policy by_team on secrets using (team = auth.jwt() ->> 'team' and id > 1)";
    let allow = "alter policy by_team on secrets using (team = auth.jwt() ->> 'team')";
    let all = [
        (deny, allow),
        ("revoke select on secrets from authenticated", "grant select on secrets to authenticated"),
        (
            "drop policy by_team on secrets",
            "create policy by_team on secrets for select to authenticated using (team = auth.jwt() ->> 'team')",
        ),
        (
            "create policy nobody on secrets as restrictive for select to authenticated using (false)",
            "drop policy nobody on secrets",
        ),
    ];
    for (take, give) in all {
        ensure!(bodies(&house.kept(&ada, path).await?) == "r");
        // Quiet: no change of the table tells it, the catalog does. A second to ask it, and one for a busy machine.
        house.postgres.execute(take).await?;
        let began = Instant::now();
        loop {
            let seen = ada.get(path).await?;
            if bodies(&seen).is_empty() {
                break;
            }
            ensure!(seen.is_hit(), "PostgreSQL itself still shows it: {seen:?}");
            ensure!(began.elapsed() < Duration::from_secs(3), "after `{take}`: {seen:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        house.postgres.execute(give).await?;
        ensure!(bodies(&house.kept_with(&ada, path, "r").await?) == "r");
        // With the table's next change: at once, whatever the catalog's turn.
        house.postgres.execute(&format!("{take}; update secrets set body = body where id = 2")).await?;
        house.reads.heard().await?;
        let seen = ada.get(path).await?;
        ensure!(bodies(&seen).is_empty(), "after `{take}` and a change: {seen:?}");
        house.postgres.execute(give).await?;
        house.kept_with(&ada, path, "r").await?;
    }
    house.server.stop().await
}

/// Between the judgement and the answer the policy becomes one whose answers are never kept. A lock on the cache table holds
/// the reader in between: he looks there first.
#[tokio::test]
async fn p5_an_answer_by_a_younger_plan_that_is_never_kept_is_not_kept() -> Result<()> {
    let house = House::with(&[("WALCAST_CACHE__L2_READ_TIMEOUT", "60s")]).await?;
    let person = |name: &str| {
        let claims = serde_json::json!({ "team": "red" });
        Reads::with_token(&house.server, walcast_testkit::jwt(support::SECRET, "authenticated", Some(name), 3600, claims))
    };
    let (ada, bob) = (person("ada"), person("bob"));
    let path = "/query/v1/secrets";
    house.kept(&ada, path).await?;
    house.reads.settled().await?;
    let admin = house.postgres.connect().await?;
    admin.batch_execute("begin; lock table walcast.cache_entries in access exclusive mode").await?;
    let asks = tokio::spawn(async move { bob.get(path).await });
    wait::until(DEADLINE, "he looks in the cache table", async || {
        let sql = "select 1 from pg_locks where relation = 'walcast.cache_entries'::regclass and not granted and mode = 'AccessShareLock'";
        admin.query(sql, &[]).await.is_ok_and(|rows| !rows.is_empty())
    })
    .await?;
    let volatile = "alter policy by_team on secrets using (team = auth.jwt() ->> 'team' and random() >= 0)";
    house.postgres.execute(volatile).await?;
    wait::until(DEADLINE, "the new policy is known", async || {
        // Who comes just before it waits for the lock, too.
        let seen = tokio::time::timeout(Duration::from_secs(1), ada.get(path)).await;
        matches!(seen, Ok(Ok(seen)) if seen.cache_status.contains("random"))
    })
    .await?;
    admin.batch_execute("commit").await?;
    let seen = asks.await??;
    ensure!(seen.status == 200 && !seen.is_hit() && !seen.cache_status.contains("stored"), "{seen:?}");
    ensure!(seen.cache_status.contains("random"), "{seen:?}");
    house.server.stop().await
}

impl House {
    /// Asks until an answer with this body is kept.
    async fn kept_with(&self, reads: &Reads, path: &str, body: &str) -> Result<Seen> {
        wait::until_some(DEADLINE, format!("{path} is kept with {body}"), async || {
            let seen = reads.get(path).await.ok()?;
            (seen.is_fresh_hit() && seen.body.contains(&format!("\"body\":\"{body}\""))).then_some(seen)
        })
        .await
    }
}
