//! What `walcast migrate` does to a real database, and what it leaves alone.

use std::{io::Write, process::Stdio};

use tokio_postgres::Client;
use walcast_engine::migrate::{MigrateOptions, migrate, print};
use walcast_testkit::TestPostgres;

/// Everything that a migration could change, as text: two equal texts are two equal databases.
const SHAPE: &str = "
select coalesce(string_agg(line, E'\\n' order by line), '') from (
  select 'role ' || rolname || rolsuper || rolinherit || rolbypassrls || rolcanlogin || rolreplication from pg_roles where rolname not like 'pg\\_%'
  union all select 'member ' || roleid::regrole || ' ' || member::regrole from pg_auth_members where member::regrole::text not like 'pg\\_%'
  union all select 'schema ' || nspname || coalesce(nspacl::text, '') from pg_namespace where nspname in ('public', 'auth', 'walcast')
  union all select 'relation ' || c.oid::regclass || relkind::text || relpersistence::text || coalesce(relacl::text, '') || coalesce(reloptions::text, '')
    from pg_class c join pg_namespace n on n.oid = relnamespace where nspname in ('public', 'auth', 'walcast')
  union all select 'column ' || attrelid::regclass || attname || atttypid::regtype || attnotnull from pg_attribute
    where attnum > 0 and attrelid in (select c.oid from pg_class c join pg_namespace n on n.oid = relnamespace where nspname in ('public', 'auth', 'walcast'))
  union all select 'function ' || p.oid::regprocedure || prosrc || coalesce(proacl::text, '') from pg_proc p join pg_namespace n on n.oid = pronamespace
    where nspname in ('public', 'auth', 'walcast')
  union all select 'publication ' || pubname || puballtables || pubviaroot || pubinsert || pubupdate from pg_publication
  union all select 'published ' || pubname || prrelid::regclass from pg_publication_rel join pg_publication p on p.oid = prpubid
  union all select 'applied ' || name from walcast.migrations
) shape(line)";

const CLINIC: &str = "
create table patients (id bigint primary key, name text);
create table \"Odd Name\" (id uuid primary key);
create table notes (body text);
create table codes (code text not null unique);
create table loud (body text); alter table loud replica identity full;
create unlogged table scratch (id int primary key);
create table visits (id bigint, day date, primary key (id, day)) partition by range (day);
create table visits_2026 partition of visits for values from ('2026-01-01') to ('2027-01-01');
create table parted (id bigint) partition by range (id);
create table parted_low partition of parted for values from (0) to (10);
create schema audit; create table audit.log (id int primary key);
create schema storage; create table storage.objects (id int primary key);";

async fn shape(client: &Client) -> anyhow::Result<String> {
    Ok(client.query_one(SHAPE, &[]).await?.get(0))
}

async fn published(client: &Client) -> anyhow::Result<Vec<String>> {
    let sql = "select n.nspname || '.' || c.relname from pg_publication_rel r join pg_publication p on p.oid = r.prpubid \
               join pg_class c on c.oid = r.prrelid join pg_namespace n on n.oid = c.relnamespace where pubname = 'walcast' order by 1";
    Ok(client.query(sql, &[]).await?.iter().map(|row| row.get(0)).collect())
}

fn psql(url: &str, sql: &str) -> anyhow::Result<()> {
    let mut child =
        std::process::Command::new("psql").args(["-X", "-q", url]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(sql.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    anyhow::ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[tokio::test]
async fn the_second_run_changes_nothing() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    server.execute(CLINIC).await?;
    let client = server.connect().await?;
    let options = MigrateOptions::default();

    let first = migrate(&server.url(), &options).await?;
    assert!(first.applied.iter().any(|name| name == "wal/0001_state"), "{first:?}");
    let before = shape(&client).await?;
    let second = migrate(&server.url(), &options).await?;
    assert_eq!((second.applied.len(), second.published.len()), (0, 0), "{second:?}");
    assert_eq!(shape(&client).await?, before);
    assert!(!second.advice.iter().any(|advice| advice.sentence.contains("is new")), "{second:?}");
    Ok(())
}

#[tokio::test]
async fn tables_that_identify_their_rows_are_published_and_the_rest_are_named() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    server.execute(CLINIC).await?;
    let report = migrate(&server.url(), &MigrateOptions::default()).await?;
    let client = server.connect().await?;
    let expected = ["audit.log", "public.Odd Name", "public.loud", "public.patients", "public.visits"];
    assert_eq!(published(&client).await?, expected);
    let mut told = report.published.clone();
    told.sort();
    assert_eq!(told, expected);

    let sql_for = |table: &str| report.advice.iter().find(|a| a.sentence.starts_with(table)).and_then(|a| a.sql.clone());
    assert!(sql_for("public.notes").unwrap().contains("replica identity full"));
    assert!(sql_for("public.parted").is_some(), "{report:?}");
    let mend = sql_for("public.codes").unwrap();
    assert_eq!(mend, r#"alter table "public"."codes" replica identity using index "codes_code_key";"#);
    assert_eq!(sql_for("public.scratch"), None);

    // The advice mends it.
    server.execute(&mend).await?;
    assert_eq!(migrate(&server.url(), &MigrateOptions::default()).await?.published, ["public.codes"]);
    // The application's own statements still work.
    server.execute("insert into patients values (1, 'a'); update patients set name = 'b'; delete from notes; insert into visits values (1, '2026-02-02'); update visits set id = 2").await?;
    Ok(())
}

#[tokio::test]
async fn the_operator_narrows_what_is_published() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    server.execute(CLINIC).await?;
    let client = server.connect().await?;
    let only = MigrateOptions { tables: vec!["patients".into()], ..MigrateOptions::default() };
    migrate(&server.url(), &only).await?;
    assert_eq!(published(&client).await?, ["public.patients"]);
    let schema = MigrateOptions { schemas: vec!["audit".into()], ..MigrateOptions::default() };
    migrate(&server.url(), &schema).await?;
    assert_eq!(published(&client).await?, ["audit.log", "public.patients"]);

    let misspelt = MigrateOptions { tables: vec!["log".into()], ..MigrateOptions::default() };
    let error = migrate(&server.url(), &misspelt).await.unwrap_err();
    assert_eq!((error.code(), error.hint().unwrap().as_str()), ("unknown_table", "did you mean `audit.log`?"));
    let error = migrate(&server.url(), &MigrateOptions { schemas: vec!["audits".into()], ..MigrateOptions::default() })
        .await
        .unwrap_err();
    assert_eq!(error.code(), "unknown_schema");
    Ok(())
}

#[tokio::test]
async fn what_exists_stays_as_it_is() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    server
        .execute(
            "create role anon login inherit; create role walcast login noreplication connection limit 3;
             create schema auth; create function auth.uid() returns uuid language sql as 'select ''00000000-0000-0000-0000-000000000007''::uuid';
             create table patients (id bigint primary key); create table private (id bigint primary key);
             create publication supabase_realtime for table patients (id) with (publish = 'insert');
             create publication walcast for table private with (publish = 'insert')",
        )
        .await?;
    let report = migrate(&server.url(), &MigrateOptions::default()).await?;
    assert!(!report.advice.iter().any(|advice| advice.sentence.contains("is new")), "{report:?}");
    let client = server.connect().await?;
    let facts: String = client
        .query_one(
            "select concat_ws(' ', (select rolcanlogin and rolinherit from pg_roles where rolname = 'anon'),
               (select rolconnlimit || rolreplication::text from pg_roles where rolname = 'walcast'),
               auth.uid(), (select count(*) from pg_publication_tables where pubname = 'supabase_realtime'),
               (select string_agg(pubinsert::text || pubupdate::text, ',') from pg_publication))",
            &[],
        )
        .await?
        .get(0);
    assert_eq!(facts, "t 3false 00000000-0000-0000-0000-000000000007 1 truefalse,truefalse");
    Ok(())
}

#[tokio::test]
async fn the_printed_sql_through_psql_gives_the_same_database() -> anyhow::Result<()> {
    let (by_us, by_hand, blind) = tokio::try_join!(TestPostgres::start(), TestPostgres::start(), TestPostgres::start())?;
    let options =
        MigrateOptions { publication_cache: "my cache".into(), serve_role: "it's me".into(), ..MigrateOptions::default() };
    for server in [&by_us, &by_hand] {
        server.execute(CLINIC).await?;
    }
    let sql = print(Some(&by_hand.url()), &options).await?;
    migrate(&by_us.url(), &options).await?;
    psql(&by_hand.url(), &sql)?;
    assert_eq!(shape(&by_hand.connect().await?).await?, shape(&by_us.connect().await?).await?);
    let nothing_left = print(Some(&by_us.url()), &options).await?;
    assert!(
        !nothing_left.contains("create table") && !nothing_left.contains("add table only \"public\".\"patients\""),
        "{nothing_left}"
    );

    // Without a URL it prints what is the same everywhere, and running it twice does no harm.
    let static_sql = print(None, &MigrateOptions::default()).await?;
    assert!(static_sql.contains("Left out, since no database URL was given"));
    psql(&blind.url(), &static_sql)?;
    let before = shape(&blind.connect().await?).await?;
    psql(&blind.url(), &static_sql)?;
    assert_eq!(shape(&blind.connect().await?).await?, before);
    Ok(())
}

/// A new function is everybody's to execute: in the transaction that makes it, it is taken from them.
#[tokio::test]
async fn p10_no_function_of_ours_is_everybodys_whichever_file_makes_it() -> anyhow::Result<()> {
    let printed = print(None, &MigrateOptions::default()).await?;
    let making = |step: &&str| step.contains("create or replace function walcast.");
    let steps: Vec<&str> = printed.split("\ncommit;\n").filter(making).collect();
    assert!(steps.len() > 3, "{printed}");
    for step in steps {
        assert!(step.contains("revoke all on function %s from public"), "{:.200}", step.trim_start());
    }
    let server = TestPostgres::start().await?;
    migrate(&server.url(), &MigrateOptions::default()).await?;
    let open = "select coalesce(string_agg(p.oid::regprocedure::text, ' '), '') from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a \
                where p.pronamespace = 'walcast'::regnamespace and a.grantee = 0";
    let open: String = server.connect().await?.query_one(open, &[]).await?.get(0);
    assert_eq!(open, "");
    Ok(())
}

#[tokio::test]
async fn two_migrations_at_once_are_one() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    let (url, options) = (server.url(), MigrateOptions::default());
    let (a, b) = tokio::try_join!(migrate(&url, &options), migrate(&url, &options))?;
    let mut applied = [a.applied, b.applied].concat();
    let all = applied.len();
    applied.sort();
    applied.dedup();
    assert_eq!(applied.len(), all, "a file ran twice");
    Ok(())
}

#[tokio::test]
async fn p10_the_serve_role_has_its_rights_and_no_others() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    server.execute(CLINIC).await?;
    migrate(&server.url(), &MigrateOptions::default()).await?;
    server.execute("grant select on patients to anon").await?;
    let walcast = server.connect_as("walcast").await?;
    walcast.batch_execute("insert into walcast.state (epoch) values ('0a1b2c3d'); update walcast.state set floor = 2; delete from walcast.state").await?;
    walcast
        .batch_execute(
            "select pg_create_logical_replication_slot('walcast', 'pgoutput'); select pg_drop_replication_slot('walcast')",
        )
        .await?;
    for role in ["anon", "authenticated", "service_role"] {
        walcast
            .batch_execute(&format!(
                "begin; set local role {role}; select auth.uid(), auth.jwt(), auth.role(), auth.email(); rollback"
            ))
            .await?;
    }
    for refused in [
        "select * from patients",
        "create table mine (i int)",
        "create table walcast.mine (i int)",
        "delete from walcast.migrations",
        "alter publication walcast drop table patients",
        "create role other",
    ] {
        assert!(walcast.batch_execute(refused).await.is_err(), "{refused}");
    }
    walcast.batch_execute("begin; set local role anon; select * from patients; rollback").await?;
    for forbidden in
        ["set role anon; select * from walcast.state", "reset role; set role service_role; select * from walcast.cache_entries"]
    {
        assert!(walcast.batch_execute(forbidden).await.is_err(), "{forbidden}");
    }
    Ok(())
}

#[tokio::test]
async fn policies_read_the_claims() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    migrate(&server.url(), &MigrateOptions::default()).await?;
    let client = server.connect().await?;
    const ASK: &str = "select concat_ws(' ', auth.uid(), auth.role(), auth.email(), auth.jwt() ->> 'x')";
    let id = "11111111-1111-4111-8111-111111111111";
    client
        .batch_execute(&format!(
            "set \"request.jwt.claims\" = '{{\"sub\":\"{id}\",\"role\":\"authenticated\",\"email\":\"a@b\",\"x\":\"1\"}}'"
        ))
        .await?;
    assert_eq!(client.query_one(ASK, &[]).await?.get::<_, String>(0), format!("{id} authenticated a@b 1"));
    client.batch_execute(&format!("set \"request.jwt.claims\" = ''; set \"request.jwt.claim.sub\" = '{id}'")).await?;
    assert_eq!(client.query_one(ASK, &[]).await?.get::<_, String>(0), id);
    Ok(())
}

#[tokio::test]
async fn a_role_that_may_not_says_whom_to_ask() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    server.execute("create role owner login createrole; grant create on database postgres to owner").await?;
    let error = migrate(&server.url_as("owner", "postgres"), &MigrateOptions::default()).await.unwrap_err();
    let hint = error.hint().unwrap_or_default();
    assert_eq!(error.code(), "migration_refused", "{error}");
    assert!(hint.contains("create role service_role nologin noinherit bypassrls"), "{error}: {hint}");
    // What the administrator runs is enough to go on, up to the next thing only they may do.
    server.execute("create role service_role nologin noinherit bypassrls; create role walcast login replication noinherit; grant service_role to walcast").await?;
    if server.major() < 16 {
        migrate(&server.url_as("owner", "postgres"), &MigrateOptions::default()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_cache_table_is_logged_only_where_the_settings_say_so_and_only_once() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    let logged = MigrateOptions { l2_logged: true, ..MigrateOptions::default() };
    let unlogged = MigrateOptions::default();
    let persistence = async || {
        let sql = "select relpersistence::text from pg_class where oid = 'walcast.cache_entries'::regclass";
        anyhow::Ok(server.connect().await?.query_one(sql, &[]).await?.get::<_, String>(0))
    };
    migrate(&server.url(), &unlogged).await?;
    assert_eq!(persistence().await?, "u");
    let sql = "alter table walcast.cache_entries set logged;";
    assert!(print(Some(&server.url()), &logged).await?.contains(sql) && print(None, &logged).await?.contains(sql));
    assert!(!print(Some(&server.url()), &unlogged).await?.contains(sql) && !print(None, &unlogged).await?.contains(sql));

    assert!(migrate(&server.url(), &logged).await?.relogged.is_some());
    assert_eq!(persistence().await?, "p");
    assert_eq!(migrate(&server.url(), &logged).await?.relogged, None, "once");
    assert!(!print(Some(&server.url()), &logged).await?.contains(sql), "where it is so already, nothing is rewritten");
    assert!(print(Some(&server.url()), &unlogged).await?.contains("alter table walcast.cache_entries set unlogged;"));
    migrate(&server.url(), &unlogged).await?;
    assert_eq!(persistence().await?, "u");

    // Each cached value would go to whoever subscribes to such a publication.
    server.execute("create publication all_of_it for all tables").await?;
    let report = migrate(&server.url(), &logged).await?;
    assert!(report.relogged.is_none() && report.advice.iter().any(|advice| advice.sentence.contains("all_of_it")), "{report:?}");
    assert_eq!(persistence().await?, "u");
    Ok(())
}
