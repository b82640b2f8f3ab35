//! `walcast.cached()`: results of functions, kept for whoever asks the same in the same security context, and for nobody else.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use walcast_testkit::wait;

use crate::{
    room::{Room, refused},
    support::DEADLINE,
};

#[tokio::test]
async fn p3_results_kept_under_row_security_are_never_anothers() -> Result<()> {
    let room = Room::open().await?;
    let (ann, bob) = (room.person("ann").await?, room.person("bob").await?);
    let admin = room.postgres.connect().await?;
    room.believed(&admin).await?;
    const ASK: &str = "select walcast.cached('report()', tags => array['diary_pages'])";
    for round in 0..3 {
        for (who, client) in [("ann", &ann), ("bob", &bob)] {
            let seen: serde_json::Value = client.query_one(ASK, &[]).await?.get(0);
            ensure!(seen == json!([format!("{who}'s page")]), "round {round}: {who} is told {seen}");
        }
    }
    let kept: i64 = admin.query_one("select count(*) from walcast.cache_entries where namespace = 'sql'", &[]).await?.get(0);
    ensure!(kept == 2, "each has one of his own: {kept}");
    // Control: what is kept is what is answered, so a mix-up would have shown.
    admin.batch_execute("update walcast.cache_entries set value = '\"kept\"' where namespace = 'sql'").await?;
    let seen: serde_json::Value = ann.query_one(ASK, &[]).await?.get(0);
    ensure!(seen == json!("kept"), "{seen}");

    // Not even by its full key, from SQL or over HTTP.
    let key: String = admin.query_one("select key from walcast.cache_entries where namespace = 'sql' limit 1", &[]).await?.get(0);
    let error = ann.query_one("select walcast.cache_get('sql', $1::text)", &[&key]).await.err().context("answered")?;
    ensure!(error.as_db_error().is_some_and(|error| error.message().contains("can be printed")), "{error:?}");
    let path: String = key.bytes().map(|byte| format!("%{byte:02X}")).collect();
    ensure!(room.reads.get(&format!("/cache/v1/sql/{path}")).await?.status == 400);

    // The owner's view is not kept for the one who calls through him.
    let by_owner: serde_json::Value = bob.query_one("select through_owner()", &[]).await?.get(0);
    ensure!(by_owner.as_array().is_some_and(|pages| pages.len() == 2), "the owner sees both: {by_owner}");
    ann.batch_execute("set \"request.jwt.claims\" = '{\"sub\":\"cid\",\"role\":\"authenticated\"}'").await?;
    let own: serde_json::Value = ann.query_one(ASK, &[]).await?.get(0);
    ensure!(own == json!(null), "another person on the same connection: {own}");

    // A setting that is named keeps tenants apart.
    for tenant in ["red", "blue", "red"] {
        admin.batch_execute(&format!("set app.tenant = '{tenant}'")).await?;
        let seen: serde_json::Value =
            admin.query_one("select walcast.cached('tenants()', vary => array['app.tenant'])", &[]).await?.get(0);
        ensure!(seen == json!(tenant), "{seen}");
    }

    // A commit on the tags, or a change of rules, ends what is kept.
    room.settled(&admin).await?;
    room.postgres.execute("insert into diary_pages values (3, 'bob', 'new')").await?;
    wait::until(DEADLINE, "bob sees the new page", async || {
        bob.query_one(ASK, &[]).await.is_ok_and(|row| row.get::<_, serde_json::Value>(0) == json!(["bob's page", "new"]))
    })
    .await?;
    room.settled(&admin).await?;
    let _: serde_json::Value = bob.query_one(ASK, &[]).await?.get(0);
    room.postgres.execute("alter policy own on diary_pages using (false)").await?;
    wait::until(DEADLINE, "the new policy holds for what is kept", async || {
        bob.query_one(ASK, &[]).await.is_ok_and(|row| row.get::<_, serde_json::Value>(0) == json!(null))
    })
    .await?;
    room.server.stop().await
}

#[tokio::test]
async fn cached_keeps_nothing_where_keeping_would_not_be_sound() -> Result<()> {
    let room = Room::open().await?;
    let client = room.postgres.connect().await?;
    room.believed(&client).await?;
    const ASK: &str = "select walcast.cached('first_version()', tags => array['items'])";
    let kept = async || -> Result<i64> {
        Ok(client.query_one("select count(*) from walcast.cache_entries where namespace = 'sql'", &[]).await?.get(0))
    };
    client.batch_execute("begin; update items set version = 5 where id = 1").await?;
    let seen: serde_json::Value = client.query_one(ASK, &[]).await?.get(0);
    ensure!(seen == json!(5), "its own write");
    client.batch_execute("commit").await?;
    ensure!(kept().await? == 0, "a transaction that has written keeps nothing");
    client.batch_execute(&format!("begin read only; {ASK}; commit")).await?;
    ensure!(kept().await? == 0, "nor does one that is read only");
    client.batch_execute("select walcast.cached('count_up()'); select walcast.cached('count_up()')").await?;
    let counted: i64 = client.query_one("select n from counter", &[]).await?.get(0);
    ensure!(counted == 2, "a function that writes runs each time: {counted}");
    ensure!(kept().await? == 0);
    room.settled(&client).await?;
    client.batch_execute(ASK).await?;
    ensure!(kept().await? == 1);
    room.server.stop().await
}

/// Nothing that is called names them: the setting stands in a function that only a view, an operator, an aggregate or a
/// default argument calls.
#[tokio::test]
async fn p3_a_setting_that_is_read_out_of_sight_keeps_nothing() -> Result<()> {
    let room = Room::open().await?;
    room.postgres
        .execute(
            "create table bills (id bigint primary key, tenant text, body text);
             insert into bills values (1, 'red', 'red''s bill'), (2, 'blue', 'blue''s bill');
             create function of_the_view() returns text language sql stable as $$ select current_setting('app.view', true) $$;
             create view my_bills as select * from bills where tenant = of_the_view();
             grant select on my_bills to authenticated;
             create function bill_report() returns jsonb language plpgsql
               as $$ begin return (select jsonb_agg(body order by id) from my_bills); end $$;",
        )
        .await?;
    let (red, blue) = (room.person("shop").await?, room.person("shop").await?);
    room.believed(&room.postgres.connect().await?).await?;
    const ASK: &str = "select walcast.cached('bill_report()')";
    red.batch_execute("set app.view = 'red'").await?;
    blue.batch_execute("set app.view = 'blue'").await?;
    let error = refused(&red, ASK).await?;
    ensure!(error.contains("reads the setting app.view"), "{error}");
    const NAMED: &str = "select walcast.cached('bill_report()', vary => array['app.view'])";
    for _ in 0..2 {
        for (who, client) in [("red", &red), ("blue", &blue)] {
            let seen: serde_json::Value = client.query_one(NAMED, &[]).await?.get(0);
            ensure!(seen == json!([format!("{who}'s bill")]), "{who} is told {seen}");
        }
    }

    room.postgres.execute("drop view my_bills; drop function of_the_view").await?;
    for (setting, made, gone) in [
        (
            "app.operator",
            "create function of_the_operator(text, int) returns boolean language sql stable
               as $$ select $1 = current_setting('app.operator', true) $$;
             create operator ~~~ (leftarg = text, rightarg = int, function = of_the_operator);
             create function asks() returns bigint language sql stable as 'select count(*) from bills where tenant ~~~ 1'",
            "drop operator ~~~ (text, int); drop function of_the_operator",
        ),
        (
            "app.aggregate",
            "create function of_the_aggregate(text, text) returns text language sql stable
               as $$ select current_setting('app.aggregate', true) $$;
             create aggregate gather(text) (sfunc = of_the_aggregate, stype = text);
             create function asks() returns text language sql stable as 'select gather(tenant) from bills'",
            "drop aggregate gather(text); drop function of_the_aggregate",
        ),
        (
            "app.default",
            "create function with_default(t text default current_setting('app.default', true)) returns text language sql as 'select $1';
             create function asks() returns text language sql stable as 'select with_default()'",
            "drop function with_default",
        ),
        ("application_name", "create function asks() returns text language sql as $$ select current_setting('application_name') $$", ""),
    ] {
        room.postgres.execute(made).await?;
        let error = refused(&red, "select walcast.cached('asks()')").await?;
        ensure!(error.contains(&format!("reads the setting {setting}")), "{setting}: {error}");
        room.postgres.execute(&format!("drop function asks; {gone}")).await?;
    }
    room.server.stop().await
}

#[tokio::test]
async fn p3_a_setting_whose_name_cannot_be_read_keeps_nothing() -> Result<()> {
    let room = Room::open().await?;
    let red = room.person("shop").await?;
    room.believed(&room.postgres.connect().await?).await?;
    for reading in [
        "current_setting($$app.x$$, true)",
        "\"current_setting\"('app.x', true)",
        "current_setting(E'app.\\x78', true)",
        "current_setting('app.' || 'x', true)",
        "current_setting(setting_name => 'app.x')",
        "current_setting /* a comment */ ('app.x', true)",
        "(select setting from pg_settings where name = 'application_name')",
    ] {
        let made =
            format!("create or replace function asks() returns text language sql stable as $body$ select {reading} $body$");
        room.postgres.execute(&format!("set check_function_bodies = off; {made}")).await?;
        // Named or not: nobody knows that it is this one.
        for vary in ["", ", vary => array['app.x', 'app.', 'application_name']"] {
            let error = refused(&red, &format!("select walcast.cached('asks()'{vary})")).await?;
            ensure!(error.contains("reads a setting whose name is not written out"), "{reading}: {error}");
        }
    }
    // What is the same for everybody, and what the key has, tells nobody apart.
    for reading in [
        "current_setting('server_version_num')",
        "CURRENT_SETTING ( 'TimeZone' )",
        "pg_catalog.current_setting('request.jwt.claims', true)",
    ] {
        let made =
            format!("create or replace function asks() returns text language sql stable as $body$ select {reading} $body$");
        room.postgres.execute(&made).await?;
        red.query_one("select walcast.cached('asks()')", &[]).await.context(reading)?;
    }
    room.server.stop().await
}
