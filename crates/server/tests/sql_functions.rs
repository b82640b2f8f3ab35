//! The cache from SQL: the same entries as over HTTP, inside the application's own transactions, for whom the config allows.

#[path = "sql_functions/cached.rs"]
mod cached;
#[path = "sql_functions/room.rs"]
mod room;
mod support;

use anyhow::{Context, Result, ensure};
use room::{Room, refused};
use serde_json::json;
use support::{
    DEADLINE,
    unseen::{Unseen, standby_never_answers},
};
use walcast_testkit::wait;

#[tokio::test]
async fn a_value_set_from_sql_is_served_over_http_and_the_other_way_round_until_a_commit_ends_both() -> Result<()> {
    let room = Room::open().await?;
    let app = room.postgres.connect().await?;
    room.believed(&app).await?;
    ensure!(room.set(&app, "from_sql", 1).await?, "stored");
    room.reads.fill("/cache/v1/notes/from_http", "items:id=1", async || Ok(room.version(&app, 1).await?.to_string())).await?;
    let seen = room.reads.get("/cache/v1/notes/from_sql").await?;
    ensure!(seen.is_from_l2() && seen.body == "1", "{seen:?}");
    wait::until(DEADLINE, "SQL finds what was put over HTTP", async || {
        room.bytes(&app, "from_http").await.is_ok_and(|value| value.as_deref() == Some(b"1"))
    })
    .await?;
    ensure!(room.get(&app, "from_sql").await? == Some(json!(1)));

    room.postgres.execute("update items set version = 2 where id = 1").await?;
    room.reads.heard().await?;
    for key in ["from_sql", "from_http"] {
        ensure!(!room.reads.get(&format!("/cache/v1/notes/{key}")).await?.is_hit(), "{key}");
        wait::until(DEADLINE, "the checkpoint knows of the commit", async || {
            room.bytes(&app, key).await.is_ok_and(|value| value.is_none())
        })
        .await?;
    }
    // Another row's value is not touched.
    room.settled(&app).await?;
    ensure!(room.set(&app, "other", 2).await?);
    room.postgres.execute("update items set version = 3 where id = 1").await?;
    room.settled(&app).await?;
    ensure!(room.get(&app, "other").await? == Some(json!(1)));
    room.server.stop().await
}

#[tokio::test]
async fn an_invalidation_from_sql_holds_when_its_transaction_commits_and_a_rolled_back_one_invalidates_nothing() -> Result<()> {
    let room = Room::open().await?;
    let app = room.postgres.connect().await?;
    room.believed(&app).await?;
    let hands = [
        ("k1", "select walcast.cache_invalidate_key('notes', 'k1')::text"),
        ("k2", "select walcast.cache_invalidate_tags(array['items:id=1'])::text"),
        ("k3", "select walcast.cache_invalidate_namespace('notes')::text"),
    ];
    for (key, sql) in hands {
        let path = format!("/cache/v1/notes/{key}");
        room.settled(&app).await?;
        ensure!(room.set(&app, key, 1).await?, "{key}");
        ensure!(room.reads.get(&path).await?.is_fresh_hit(), "{key}");

        app.batch_execute(&format!("begin; {sql}")).await?;
        room.reads.heard().await?;
        ensure!(room.reads.get(&path).await?.is_fresh_hit(), "{key}: nothing is committed yet");
        ensure!(room.get(&app, key).await?.is_none(), "{key}: its own transaction is not answered what it has ended");
        app.batch_execute("rollback").await?;
        room.reads.heard().await?;
        ensure!(room.reads.get(&path).await?.is_fresh_hit(), "{key}: nothing was committed");
        ensure!(room.get(&app, key).await?.is_some(), "{key}");

        let xid: String = app.query_one(sql, &[]).await?.get(0);
        room.reads.heard().await?;
        ensure!(!room.reads.get(&path).await?.is_hit(), "{key}: committed");
        ensure!(!room.reads.get_at_least(&path, &xid).await?.is_hit(), "{key}: nor as fresh as its own transaction");
        room.settled(&app).await?;
        ensure!(room.get(&app, key).await?.is_none(), "{key}");
    }
    room.server.stop().await
}

#[tokio::test]
async fn a_value_set_in_a_transaction_that_rolls_back_is_nobodys() -> Result<()> {
    let room = Room::open().await?;
    let app = room.postgres.connect().await?;
    room.believed(&app).await?;
    app.batch_execute("begin").await?;
    ensure!(room.set_in_transaction(&app, "k", 1).await?);
    ensure!(!room.reads.get("/cache/v1/notes/k").await?.is_hit(), "not committed");
    // Somebody else at the same key gives way and waits for nobody.
    let other = room.postgres.connect().await?;
    ensure!(!room.set(&other, "k", 1).await?);
    app.batch_execute("rollback").await?;
    ensure!(!room.reads.get("/cache/v1/notes/k").await?.is_hit());
    ensure!(room.get(&app, "k").await?.is_none());

    // What a transaction itself wrote ends what it stored: nobody saw it when the fence was taken.
    app.batch_execute("begin isolation level repeatable read; update items set version = 9 where id = 3").await?;
    ensure!(room.set_in_transaction(&app, "own", 3).await?);
    app.batch_execute("commit").await?;
    room.reads.heard().await?;
    ensure!(!room.reads.get("/cache/v1/notes/own").await?.is_hit());
    room.server.stop().await
}

/// The value is read before a commit and set after it. With the fence of the time of reading nobody gets it as fresh, ever;
/// the control, whose fence is of the time of setting, is served for good: which is why a fence cannot be left out.
#[tokio::test]
async fn p5_a_value_read_before_a_commit_and_set_after_it_is_never_answered() -> Result<()> {
    let room = Room::open().await?;
    let app = room.postgres.connect().await?;
    room.believed(&app).await?;
    let fence: String = app.query_one("select walcast.cache_fence()", &[]).await?.get(0);
    let old = room.version(&app, 1).await?;
    room.postgres.execute("update items set version = 2 where id = 1").await?;
    const SET: &str =
        "select walcast.cache_set('notes', $1::text, to_jsonb($2::bigint), tags => array['items:id=1'], fence => $3::text)";
    let now: String = app.query_one("select walcast.cache_fence()", &[]).await?.get(0);
    app.query_one(SET, &[&"sound", &old, &fence]).await?;
    let control: bool = app.query_one(SET, &[&"control", &old, &now]).await?.get(0);
    ensure!(control, "the control is stored");
    for _ in 0..2 {
        room.settled(&app).await?;
        ensure!(!room.reads.get("/cache/v1/notes/sound").await?.is_hit());
        ensure!(room.get(&app, "sound").await?.is_none());
        let caught = room.reads.get("/cache/v1/notes/control").await?;
        ensure!(caught.is_fresh_hit() && caught.body == "1", "the control must be caught: {caught:?}");
        ensure!(room.get(&app, "control").await? == Some(json!(1)));
    }
    let code = refused(&app, "select walcast.cache_set('notes', 'k', '1', tags => array['items:id=1'])").await?;
    ensure!(code.contains("under read committed nobody knows"), "{code}");
    // Under repeatable read the transaction's snapshot is the fence, taken before the commit that comes in between.
    app.batch_execute("begin isolation level repeatable read").await?;
    let old = room.version(&app, 1).await?;
    room.postgres.execute("update items set version = 3 where id = 1").await?;
    app.execute("select walcast.cache_set('notes', 'rr', to_jsonb($1::bigint), tags => array['items:id=1'])", &[&old]).await?;
    app.batch_execute("commit").await?;
    room.settled(&app).await?;
    ensure!(!room.reads.get("/cache/v1/notes/rr").await?.is_hit());
    room.server.stop().await
}

/// The commit has been streamed, its tags are raised, and no snapshot sees it yet. The place up to which the stream was **read**
/// would vouch for a value that does not contain it (the control); the place up to which all is **settled** does not.
#[tokio::test]
async fn p5_a_commit_that_was_streamed_before_it_is_visible_ends_what_was_read_meanwhile() -> Result<()> {
    let room = Room::open().await?;
    let app = room.postgres.connect().await?;
    app.batch_execute("set synchronous_commit = local").await?;
    // Described already: a table in doubt whose commit does not settle would let everything of it fall.
    app.batch_execute("update items set version = version where id = 1").await?;
    room.reads.settled().await?;
    room.believed(&app).await?;
    standby_never_answers(&room.postgres).await?;
    let unseen = Unseen::commit(&room.postgres, "update items set version = 2 where id = 1").await?;
    room.reads.heard().await?;
    room.checkpointed(&app).await?;
    ensure!(room.version(&app, 1).await? == 1, "nobody sees it yet");
    room.set_with_fence(&app, "sound", 1).await?;
    room.set_with_fence(&app, "control", 5).await?;
    app.batch_execute(
        "update walcast.cache_entries set tags = array['items:id=1'], settled = (select clock_lsn from walcast.sentinel) where key = 'control'",
    )
    .await?;
    unseen.settle().await?;
    wait::until(DEADLINE, "the commit is visible", async || room.version(&app, 1).await.is_ok_and(|version| version == 2))
        .await?;
    room.settled(&app).await?;
    ensure!(!room.reads.get("/cache/v1/notes/sound").await?.is_hit());
    ensure!(room.get(&app, "sound").await?.is_none());
    let caught = room.reads.get("/cache/v1/notes/control").await?;
    ensure!(caught.is_fresh_hit() && caught.body == "1", "the control must be caught: {caught:?}");
    room.server.stop().await
}

#[tokio::test]
async fn p5_after_writers_and_setters_have_raced_no_stale_value_is_left() -> Result<()> {
    const KEYS: i64 = 20;
    let room = Room::open().await?;
    let app = room.postgres.connect().await?;
    room.believed(&app).await?;
    let mut tasks = Vec::new();
    for worker in 0..6 {
        let client = room.postgres.connect().await?;
        tasks.push(tokio::spawn(async move {
            let mut stored = 0;
            for round in 0..150_i64 {
                let id = (round * 7 + worker) % KEYS + 1;
                if worker < 2 {
                    client.execute("update items set version = version + 1 where id = $1", &[&id]).await?;
                    continue;
                }
                let fence: String = client.query_one("select walcast.cache_fence()", &[]).await?.get(0);
                let version: i64 = client.query_one("select version from items where id = $1", &[&id]).await?.get(0);
                let sql = "select walcast.cache_set('notes', 'race:' || $1::bigint, to_jsonb($2::bigint), tags => array['items:id=' || $1::bigint], fence => $3::text)";
                let ok: bool = client.query_one(sql, &[&id, &version, &fence]).await?.get(0);
                stored += i32::from(ok);
            }
            anyhow::Ok(stored)
        }));
    }
    let mut stored = 0;
    for task in tasks {
        stored += task.await??;
    }
    ensure!(stored > 20, "only {stored} were stored: nothing raced");
    room.settled(&app).await?;
    // The last word of a race may have been a writer's at every key: one is set when all is quiet.
    let fence: String = app.query_one("select walcast.cache_fence()", &[]).await?.get(0);
    let set = "select walcast.cache_set('notes', 'race:1', (select to_jsonb(version) from items where id = 1), tags => array['items:id=1'], fence => $1::text)";
    ensure!(app.query_one(set, &[&fence]).await?.get::<_, bool>(0), "what is read when all is quiet is kept");
    let mut hits = 0;
    for id in 1..=KEYS {
        let version = room.version(&app, id).await?;
        let seen = room.reads.get(&format!("/cache/v1/notes/race:{id}")).await?;
        ensure!(!seen.is_fresh_hit() || seen.body == version.to_string(), "{id}: {version} is {seen:?}");
        let from_sql = room.get(&app, &format!("race:{id}")).await?;
        ensure!(from_sql.is_none() || from_sql == Some(json!(version)), "{id}: {version} is {from_sql:?}");
        hits += i32::from(from_sql.is_some());
    }
    ensure!(hits > 0, "a cache that forgets all proves nothing");
    room.server.stop().await
}

#[tokio::test]
async fn a_role_without_a_grant_is_refused_by_name_and_nobody_reads_the_tables() -> Result<()> {
    let room = Room::open().await?;
    let client = room.postgres.connect().await?;
    for (role, sql, why) in [
        ("anon", "select walcast.cache_get('notes', 'k')", "role \"anon\" has no right to read in cache namespace \"notes\""),
        ("anon", "select walcast.cache_invalidate_key('notes', 'k')", "role \"anon\" has no right to invalidate"),
        ("authenticated", "select walcast.cache_get('unlisted', 'k')", "no right to read in cache namespace \"unlisted\""),
        (
            "authenticated",
            "select walcast.cache_invalidate_tags(array['items'])",
            "role \"authenticated\" may not invalidate by tags",
        ),
        ("authenticated", "select walcast.cache_invalidate_namespace('unlisted')", "no right to invalidate in cache namespace"),
        (
            "authenticated",
            "select walcast.cache_invalidate_namespace('sql')",
            "no right to invalidate in cache namespace \"sql\"",
        ),
        ("authenticated", "select walcast.cache_get('mine', 'k')", "has an entry of its own for each security context"),
        ("service_role", "select walcast.cache_set('sessions', 'k', '1')", "put and read over HTTP alone"),
        ("service_role", "select walcast.cache_get('query.items', 'k')", "holds what queries keep"),
        ("anon", "select walcast.cached('report()')", "role \"anon\" has no right to read in cache namespace \"sql\""),
        ("authenticated", "select walcast.cached('secret()')", "may not execute public.secret()"),
        ("anon", "select * from walcast.cache_entries", "permission denied for table cache_entries"),
        (
            "authenticated",
            "insert into walcast.namespace_grants values ('x', 'authenticated', true)",
            "permission denied for table",
        ),
        ("authenticated", "select * from walcast.clock", "permission denied for table clock"),
        ("authenticated", "select walcast.cache_find('unlisted', 'k')", "permission denied for function cache_find"),
        (
            "authenticated",
            "select walcast.cache_store('n', 'k', '', '', null, '{}', '')",
            "permission denied for function cache_store",
        ),
        ("authenticated", "select walcast.cache_raise(array['~all'])", "permission denied for function cache_raise"),
        ("nobody", "select walcast.cache_get('notes', 'k')", "permission denied for schema walcast"),
    ] {
        client.batch_execute(&format!("set role {role}")).await?;
        let error = refused(&client, sql).await?;
        ensure!(error.contains(why), "{role}: {sql}: {error}");
        client.batch_execute("reset role").await?;
    }
    // Whoever inherits a role's rights has its grants; a role that a session cannot take gives nothing.
    let nurse = room.postgres.connect_as("nurse").await?;
    nurse.query_one("select walcast.cache_get('notes', 'k')", &[]).await?;
    ensure!(refused(&nurse, "set role service_role").await?.contains("permission denied"));
    ensure!(refused(&nurse, "select set_config('role', 'service_role', false)").await?.contains("permission denied"));
    nurse.batch_execute("set \"request.jwt.claims\" = '{\"role\":\"service_role\"}'").await?;
    ensure!(refused(&nurse, "select walcast.cache_get('unlisted', 'k')").await?.contains("role \"nurse\""));
    room.server.stop().await
}

#[tokio::test]
async fn what_cannot_be_meant_is_refused_with_the_reason_and_the_way_to_say_it() -> Result<()> {
    let room = Room::open().await?;
    let client = room.postgres.connect().await?;
    room.believed(&client).await?;
    let set = |arguments: &str| format!("begin isolation level repeatable read; select walcast.cache_set({arguments})");
    for (sql, why) in [
        (set("'a b', 'k', '1'"), "namespace 'a b' must be"),
        (set("null, 'k', '1'"), "namespace null must be"),
        (set("'notes', '', '1'"), "a cache key has 1 to 512 characters"),
        (set("'notes', repeat('é', 513), '1'"), "a cache key has 1 to 512 characters"),
        (set("'notes', E'a\\u001fb', '1'"), "a cache key has 1 to 512 characters"),
        (set("'notes', 'k', null"), "there is no value"),
        (set("'notes', 'k', '1', '0.5 s'"), "a ttl is between"),
        (set("'notes', 'k', '1', '31 days'"), "a ttl is between"),
        (set("'notes', 'k', '1', 'infinity'::text::interval"), "interval"),
        (set("'notes', 'k', '1', tags => null"), "tags are one list"),
        (set("'notes', 'k', '1', tags => array_fill('t'::text, array[65])"), "at most 64"),
        (set("'notes', 'k', '1', tags => array[null::text]"), "tag null"),
        (set("'notes', 'k', '1', tags => array['~all']"), "tag '~all'"),
        (set("'notes', 'k', '1', tags => array['a,b']"), "tag 'a,b'"),
        (set("'notes', 'k', '1', tags => array[' a']"), "tag ' a'"),
        (set("'notes', 'k', '1', tags => array['items:id=01']"), "is not raised by commits"),
        (set("'notes', 'k', '1', tags => array['items:version=1']"), "in no key, index or foreign key"),
        (set("'notes', 'k', '1', tags => array['public.items']"), "commits spell it items"),
        (set("'notes', 'k', '1', tags => array['items:id=*']"), "raised only where a value is not known"),
        (set("'notes', 'k', '1', tags => array['diary']"), "not in the cache's publication"),
        (set("'notes', 'k', to_jsonb(repeat('x', 2000000))"), "a value has at most 1048576 bytes"),
        (set("'notes', 'k', '1', fence => 'x'"), "no fence that this database gave"),
        (set("'notes', 'k', '1', fence => '0a1b2c3d|1|0/1|1:9999999999999999999:'"), "no fence that this database gave"),
        (set("'notes', 'k', '1', fence => '0a1b2c3d|1|123456789/0|1:1:'"), "no fence that this database gave"),
        ("select walcast.cache_invalidate_tags(array['~all'])".into(), "tag '~all'"),
        ("select walcast.cached('secret()', '{}')".into(), "takes its arguments as one JSON list"),
        ("select walcast.cached('report()', '[1]')".into(), "takes 0 arguments, not 1"),
        ("select walcast.cached('many()')".into(), "returns a set of rows"),
        ("select walcast.cached('nothing()')".into(), "returns nothing that could be kept"),
        ("select walcast.cached('pg_catalog.sum(int)')".into(), "is a procedure, an aggregate"),
        (
            "select walcast.cached('pg_catalog.array_append(anycompatiblearray, anycompatible)', '[[], 1]')".into(),
            "no declared type",
        ),
        (
            "select walcast.cached('add(int, numeric)', '[\"1); drop table items; --\", 2]')".into(),
            "invalid input syntax for type integer",
        ),
        ("select walcast.cached('report()', vary => array[null::text])".into(), "vary is a list"),
        ("select walcast.cached('tenants()')".into(), "reads the setting app.tenant"),
    ] {
        let error = refused(&client, &sql).await?;
        ensure!(error.contains(why), "{sql}: {error}");
        client.batch_execute("rollback").await?;
    }
    let sum: serde_json::Value =
        client.query_one("select walcast.cached('add(int, numeric)', '[\"1\", 2.50]')", &[]).await?.get(0);
    ensure!(sum == json!(3.50));
    // A tag that names no table is the application's own, percent signs and all.
    for tag in ["100%", "no such table", "diary:%zz=1", "a:b=c"] {
        client.batch_execute("begin isolation level repeatable read").await?;
        client.query_one("select walcast.cache_set('notes', 'k', '1', tags => array[$1::text])", &[&tag]).await.context(tag)?;
        client.batch_execute("rollback").await?;
    }
    room.server.stop().await
}

/// When Walcast attaches again its checkpoint begins anew with nothing settled, so a fence of before is ahead of it. What the
/// checkpoint says in between is written by hand, in a transaction of its own, so that no later one comes in between.
#[tokio::test]
async fn p6_a_fence_that_is_ahead_of_the_checkpoint_stores_nothing_and_fails_no_transaction() -> Result<()> {
    let room = Room::open().await?;
    let app = room.postgres.connect().await?;
    room.believed(&app).await?;
    let fence: String = app.query_one("select walcast.cache_fence()", &[]).await?.get(0);
    const SET: &str = "select walcast.cache_set('notes', 'k', '1', fence => $1::text)";
    app.batch_execute("begin; update walcast.sentinel set settled_lsn = '0/0'").await?;
    ensure!(!app.query_one(SET, &[&fence]).await?.get::<_, bool>(0), "ahead of what is settled");
    app.batch_execute("rollback; begin isolation level repeatable read; select 1").await?;
    // Another session's transaction begins and ends, and its fence is younger than this one's snapshot.
    room.postgres.execute("update items set version = version where id = 1").await?;
    let younger: String = room.postgres.connect().await?.query_one("select walcast.cache_fence()", &[]).await?.get(0);
    ensure!(!app.query_one(SET, &[&younger]).await?.get::<_, bool>(0), "ahead of the transaction's snapshot");
    let forged = fence.split('|').take(2).chain(["FFFFFFFF/0", "1:1:"]).collect::<Vec<_>>().join("|");
    ensure!(!app.query_one(SET, &[&forged]).await?.get::<_, bool>(0), "ahead of all that was ever written");
    app.batch_execute("commit").await?;
    ensure!(app.query_one(SET, &[&fence]).await?.get::<_, bool>(0), "and is good again when the checkpoint is");
    room.server.stop().await
}

#[tokio::test]
async fn p5_after_a_crash_or_without_walcast_sql_answers_nothing_of_before() -> Result<()> {
    let mut room = Room::open().await?;
    let app = room.postgres.connect().await?;
    room.believed(&app).await?;
    ensure!(room.set(&app, "k", 1).await? && room.get(&app, "k").await?.is_some());
    room.server.kill9().await?;
    wait::until(DEADLINE, "the checkpoint is too old to be believed", async || {
        room.get(&app, "k").await.is_ok_and(|value| value.is_none())
    })
    .await?;
    ensure!(!room.set(&app, "k2", 1).await?, "nor is anything stored");
    room.server.start_again().await?;
    room.believed(&app).await?;
    ensure!(room.get(&app, "k").await? == Some(json!(1)), "a restart of Walcast alone forgets nothing");

    room.postgres.kill9().await?;
    room.postgres.start_again().await?;
    let app = room.postgres.connect().await?;
    ensure!(room.get(&app, "k").await?.is_none());
    room.server.wait_ready(true).await?;
    room.believed(&app).await?;
    ensure!(room.get(&app, "k").await?.is_none());
    ensure!(room.set(&app, "k", 1).await? && room.get(&app, "k").await?.is_some(), "and goes on");
    room.server.stop().await
}

#[tokio::test]
async fn migrate_prints_functions_and_grants_and_writes_what_the_config_says_now() -> Result<()> {
    let room = Room::open().await?;
    let printed = room.printed().await?;
    for part in [
        "function walcast.cache_get(",
        "function walcast.cached(",
        "'notes', 'authenticated', true, true, true",
        "grant execute on function walcast",
    ] {
        ensure!(printed.contains(part), "{part}");
    }
    let client = room.postgres.connect().await?;
    let grants = async || -> Result<Vec<String>> {
        let rows = client.query("select namespace || ' ' || role from walcast.namespace_grants order by 1", &[]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    };
    ensure!(grants().await? == ["mine authenticated", "notes authenticated", "sql authenticated"]);
    client.batch_execute("insert into walcast.namespace_grants values ('*', 'nurse', false, false, true)").await?;
    room.configure("[cache.namespaces.notes]\nread = ['nurse', 'claim:app_role=nurse']\n").await?;
    ensure!(grants().await? == ["* nurse", "notes nurse"], "{:?}", grants().await?);
    let nurse = room.postgres.connect_as("nurse").await?;
    nurse.query_one("select walcast.cache_invalidate_tags(array['reports'])::text", &[]).await?;
    room.server.stop().await
}
