//! P4 and P5 while tables, indexes, policies and privileges change under a running Walcast.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use support::{
    DEADLINE, Server, migrate,
    queries::QueryDir,
    reads::{By, Reads, Seen},
    unseen::{Unseen, standby_never_answers},
};
use walcast_testkit::{SseStream, TestPostgres, wait};

const SCHEMA: &str = "create table pets (id bigint primary key, owner bigint not null, kind text not null, name text not null);
    alter table pets replica identity full;
    insert into pets select i, i % 10, 'cat', 'pet ' || i from generate_series(1, 100) i;
    create table secrets (id bigint primary key, team text not null, body text not null);
    alter table secrets enable row level security;
    create policy by_team on secrets for select to authenticated using (team = auth.jwt() ->> 'team');
    insert into secrets values (1, 'red', 'r'), (2, 'blue', 'b');
    grant select on pets, secrets to authenticated, service_role;";

const PETS: &str = "-- param: owner bigint\nselect id, name from pets where owner = $1 order by id\n";
const SECRETS: &str = "select id, body from secrets order by id\n";

struct House {
    postgres: TestPostgres,
    server: Server,
    reads: Reads,
    _queries: QueryDir,
}

impl House {
    async fn open() -> Result<House> {
        House::with(&[]).await
    }

    async fn with(settings: &[(&str, &str)]) -> Result<House> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, SCHEMA, &["pets"]).await?;
        let queries = QueryDir::new(&[("pets", PETS), ("secrets", SECRETS)])?;
        let dir = queries.setting();
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
    standby_never_answers(&house.postgres).await?;
    let unseen = Unseen::commit(&house.postgres, "update pets set name = 'new' where id = 1").await?;
    let sees = async |what: &str, sql: &str| {
        wait::until(DEADLINE, what, async || looker.query(sql, &[]).await.is_ok_and(|rows| !rows.is_empty())).await
    };
    house.reads.heard().await?;
    let builder = house.postgres.connect().await?;
    builder.batch_execute("set synchronous_commit = local").await?;
    let build = tokio::spawn(async move { builder.batch_execute("create index concurrently by_owner on pets (owner)").await });
    sees("the index shows", "select from pg_class where relname = 'by_owner'").await?;
    // Planned for the first time now, before the catalog's turn comes round.
    let old = house.truth(1).await?;
    let seen = house.pets(1).await?;
    ensure!(seen.json()? == old, "control: the commit is not visible yet: {seen:?}");
    unseen.settle().await?;
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

/// Vacuum and statistics make PostgreSQL describe a table again, just as a change of it would.
#[tokio::test]
async fn p4_vacuum_and_analyze_leave_the_entries_of_a_table_and_a_written_row_takes_its_own() -> Result<()> {
    let house = House::open().await?;
    house.postgres.execute("update pets set name = 'early' where id = 1").await?;
    house.reads.heard().await?;
    let key = |id: i64| format!("/cache/v1/pets/{id}");
    for id in 1..=3 {
        ensure!(house.reads.fill(&key(id), &format!("pets:id={id}"), async || Ok("x".into())).await? == "stored");
    }
    for (at, upkeep) in ["analyze pets", "vacuum pets", "vacuum analyze pets", "vacuum freeze pets"].into_iter().enumerate() {
        house.postgres.execute(upkeep).await?;
        house.postgres.execute(&format!("update pets set name = 'after {at}' where id = 1")).await?;
        house.reads.heard().await?;
        ensure!(!house.reads.get(&key(1)).await?.is_hit(), "after `{upkeep}` the written row's entry stayed");
        for id in [2, 3] {
            let seen = house.reads.get(&key(id)).await?;
            ensure!(seen.is_fresh_hit(), "after `{upkeep}` the entry of another row fell: {seen:?}");
        }
        ensure!(house.reads.fill(&key(1), "pets:id=1", async || Ok("x".into())).await? == "stored");
    }
    // Rewritten as well, which maintenance does not excuse.
    house.each("alter table pets alter name type text using name || '!'; analyze pets").await?;
    house.postgres.execute("update pets set name = 'last' where id = 1").await?;
    house.reads.heard().await?;
    for id in [2, 3] {
        ensure!(!house.reads.get(&key(id)).await?.is_hit(), "control: a rewritten table's entry stayed");
    }
    house.server.stop().await
}

/// What was made and dropped leaves no row in the catalog: nothing but the description tells it.
#[tokio::test]
async fn p4_what_was_changed_and_changed_back_between_two_looks_takes_the_entries_with_the_next_change() -> Result<()> {
    for there_and_back in [
        "create policy p on pets for select using (true); drop policy p on pets",
        "create index i on pets (kind); drop index i",
        "grant select on pets to public; revoke select on pets from public",
        "grant select (kind) on pets to public; revoke select (kind) on pets from public",
        "alter table pets alter name type text using name || '!'; alter table pets alter name type text using rtrim(name, '!')",
    ] {
        let house = House::open().await?;
        // Described once already, so that the next description has a reason; and not for the first time.
        house.postgres.execute("update pets set name = 'early' where id = 1").await?;
        house.reads.heard().await?;
        let key = "/cache/v1/pets/2";
        ensure!(house.reads.fill(key, "pets:id=2", async || Ok("x".into())).await? == "stored");
        house.postgres.execute("update pets set name = 'other' where id = 1").await?;
        house.reads.heard().await?;
        ensure!(house.reads.get(key).await?.is_fresh_hit(), "control: another row's change");
        house.each(&format!("{there_and_back}; update pets set name = 'next' where id = 1")).await?;
        house.reads.heard().await?;
        ensure!(!house.reads.get(key).await?.is_hit(), "after `{there_and_back}`");
        house.server.stop().await?;
    }
    Ok(())
}

/// Nothing in the stream tells that its rows are others now.
#[tokio::test]
async fn p4_entries_of_a_quiet_table_that_was_rewritten_fall_without_any_change_of_it() -> Result<()> {
    for ddl in [
        "alter table pets alter name type text using name || '!'",
        "alter table pets add born date default current_date",
        "alter publication walcast drop table pets",
        "grant select on pets to public",
    ] {
        let house = House::open().await?;
        let (key, query) = ("/cache/v1/pets/2", "/query/v1/pets?owner=1");
        house.kept(&house.reads, query).await?;
        ensure!(house.reads.fill(key, "pets:id=2", async || Ok("x".into())).await? == "stored");
        house.postgres.execute(ddl).await?;
        for path in [key, query] {
            // Seen fresh from before it no longer; whatever is kept afterwards was read from the new table.
            let gone = async || house.reads.get(path).await.is_ok_and(|seen| !seen.is_hit());
            wait::until(DEADLINE, format!("`{ddl}` takes {path}"), gone).await?;
        }
        if !ddl.contains("publication") {
            ensure!(house.kept(&house.reads, query).await?.json()? == house.truth(1).await?);
        }
        house.server.stop().await?;
    }
    Ok(())
}

/// A subscriber who reads again on an event must not meet what the table's own DDL has made old.
#[tokio::test]
async fn p4_ddl_of_a_table_takes_its_entries_before_the_next_event_is_told() -> Result<()> {
    for (described, ddl) in [
        (true, "alter table pets alter name type text using name || '!'"),
        (false, "alter table pets alter name type text using name || '!'"),
        (true, "create policy p on pets for select using (true)"),
        (true, "grant select on pets to public"),
        (false, "revoke select on pets from authenticated"),
    ] {
        let house = House::open().await?;
        if described {
            house.postgres.execute("update pets set name = 'early' where id = 1").await?;
            house.reads.heard().await?;
        }
        let key = "/cache/v1/pets/2";
        ensure!(house.reads.fill(key, "pets:id=2", async || Ok("x".into())).await? == "stored");
        let token = house.server.token("service_role", None);
        let mut events = SseStream::open(&format!("{}/sse/v1/changes?table=pets", house.server.url), Some(&token), None).await?;
        events.next_where(|event| event.event == "live", DEADLINE).await?;
        house.each(&format!("{ddl}; update pets set name = 'next' where id = 1")).await?;
        events.next_where(|event| event.event == "change", DEADLINE).await?;
        ensure!(!house.reads.get(key).await?.is_hit(), "after `{ddl}` (described: {described}) and its event");
        house.server.stop().await?;
    }
    Ok(())
}

/// The process that comes back finds the table another one than the checkpoint's.
#[tokio::test]
async fn p4_a_table_that_was_rewritten_while_nobody_listened_leaves_no_entry_behind() -> Result<()> {
    let house = House::open().await?;
    let House { postgres, server, _queries, .. } = house;
    let dir = _queries.path().to_string_lossy().into_owned();
    let settings = [("WALCAST_QUERIES__DIR", dir.as_str())];
    let key = "/cache/v1/pets/2";
    let filled = Reads::service(&server).fill(key, "pets:id=2", async || Ok("x".into())).await?;
    ensure!(filled == "stored", "{filled}");
    let client = postgres.connect().await?;
    let stored = "select from walcast.cache_entries where namespace = 'pets'";
    wait::until(DEADLINE, "it is stored", async || client.query(stored, &[]).await.is_ok_and(|rows| !rows.is_empty())).await?;
    let mut server = server;
    for (between, stays) in [("vacuum analyze pets", true), ("alter table pets alter name type text using name || '!'", false)] {
        server.stop().await?;
        postgres.execute(between).await?;
        server = Server::start(&postgres, &settings).await?;
        let seen = Reads::service(&server).get(key).await?;
        ensure!(seen.is_fresh_hit() == stays, "after `{between}` and a restart: {seen:?}");
    }
    server.stop().await
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
    /// Each statement commits by itself.
    async fn each(&self, statements: &str) -> Result<()> {
        for statement in statements.split("; ") {
            self.postgres.execute(statement).await?;
        }
        Ok(())
    }

    /// Asks until an answer with this body is kept.
    async fn kept_with(&self, reads: &Reads, path: &str, body: &str) -> Result<Seen> {
        wait::until_some(DEADLINE, format!("{path} is kept with {body}"), async || {
            let seen = reads.get(path).await.ok()?;
            (seen.is_fresh_hit() && seen.body.contains(&format!("\"body\":\"{body}\""))).then_some(seen)
        })
        .await
    }
}
