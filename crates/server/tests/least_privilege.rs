//! P10: at run time Walcast is a role without any power of its own: what `walcast migrate --print` shows, and nothing more.

mod support;

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_json::json;
use support::{DEADLINE, SERVE_ROLE, Server, migrate};
use tokio::process::Command;
use walcast_testkit::{SseStream, TestPostgres};

const SCHEMA: &str = "
create table patients (id bigint primary key, owner uuid, name text);
alter table patients enable row level security;
alter table patients replica identity full;
create policy own on patients for select to authenticated using (owner = auth.uid());
grant select on patients to authenticated, service_role;
create table public_list (id bigint primary key);
create sequence invoice_numbers;
create schema books;
create table books.accounts (id bigint primary key);
create function wipe() returns void language sql security definer as $$ delete from patients $$;
revoke all on function wipe() from public;
insert into patients values (1, '00000000-0000-4000-8000-00000000000a', 'Ada');";

async fn prepared() -> Result<TestPostgres> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["patients"]).await?;
    Ok(postgres)
}

#[tokio::test]
async fn p10_the_serve_role_has_the_attributes_and_memberships_that_migrate_shows_and_no_other() -> Result<()> {
    let postgres = prepared().await?;
    let admin = postgres.connect().await?;
    let row = admin
        .query_one(
            "select rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolinherit, rolcanlogin, rolreplication, rolconfig is null \
             from pg_roles where rolname = $1",
            &[&SERVE_ROLE],
        )
        .await?;
    let attributes: Vec<bool> = (0..8).map(|at| row.get(at)).collect();
    assert_eq!(
        attributes,
        [false, false, false, false, false, true, true, true],
        "super, createrole, createdb, bypassrls, inherit, login, replication, no settings"
    );

    let rows = admin
        .query(
            "select r.rolname::text, m.admin_option from pg_auth_members m join pg_roles r on r.oid = m.roleid \
             where m.member = $1::text::regrole order by 1",
            &[&SERVE_ROLE],
        )
        .await?;
    let member_of: Vec<(String, bool)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(member_of, ["anon", "authenticated", "service_role"].map(|role| (role.to_owned(), false)));

    // What the printed SQL says is what stands in the catalog.
    let printed =
        Command::new(env!("CARGO_BIN_EXE_walcast")).args(["migrate", "--print"]).env_remove("WALCAST_CONFIG").output().await?;
    let printed = String::from_utf8(printed.stdout)?;
    assert!(printed.contains("create role %I login replication noinherit"), "{printed}");
    let said: Vec<&str> =
        printed.lines().filter(|line| line.contains("to %I', target, serve)") || line.contains("%I', serve)")).collect();
    assert!(
        !said.is_empty() && said.iter().all(|line| !line.contains("all privileges") && !line.contains("grant all")),
        "{said:?}"
    );
    assert!(!printed.to_lowercase().contains("superuser"), "nothing asks for a superuser");
    Ok(())
}

/// Each right that is granted to the role by name, or that it owns.
#[tokio::test]
async fn p10_the_serve_role_is_granted_its_own_schema_and_owns_nothing() -> Result<()> {
    let postgres = prepared().await?;
    // A slot, and whatever else the first start makes, must not need or leave more.
    Server::start(&postgres, &[]).await?.stop().await?;
    let admin = postgres.connect().await?;
    let rows = admin
        .query(
            "with me as (select $1::text::regrole::oid as oid)
             select c.oid::regclass::text || ' ' || a.privilege_type from pg_class c, aclexplode(c.relacl) a, me where a.grantee = me.oid
             union select n.nspname || ' ' || a.privilege_type from pg_namespace n, aclexplode(n.nspacl) a, me where a.grantee = me.oid
             union select 'database ' || a.privilege_type from pg_database d, aclexplode(d.datacl) a, me where a.grantee = me.oid
             union select p.oid::regprocedure || ' ' || a.privilege_type from pg_proc p, aclexplode(p.proacl) a, me where a.grantee = me.oid
             union select 'column ' || t.attrelid::regclass || '.' || t.attname from pg_attribute t, aclexplode(t.attacl) a, me where a.grantee = me.oid
             union select 'default ' || a.privilege_type from pg_default_acl d, aclexplode(d.defaclacl) a, me where a.grantee = me.oid
             union select 'setting ' || p.parname from pg_parameter_acl p, aclexplode(p.paracl) a, me where a.grantee = me.oid",
            &[&SERVE_ROLE],
        )
        .await?;
    let granted: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let tables = [
        "walcast.state",
        "walcast.clock",
        "walcast.sentinel",
        "walcast.selections",
        "walcast.cache_leases",
        "walcast.cache_entries",
        "walcast.cache_cleanups",
        "walcast.registry_instances",
        "walcast.subscription_registry",
    ];
    let mut expected: BTreeSet<String> = tables
        .iter()
        .flat_map(|table| ["SELECT", "INSERT", "UPDATE", "DELETE"].map(|right| format!("{table} {right}")))
        .collect();
    expected.extend(
        ["walcast USAGE", "walcast.migrations SELECT", "walcast.cache_cleanup_days SELECT", "walcast.subscription_health SELECT"]
            .map(str::to_owned),
    );
    assert_eq!(granted, expected);

    let owned: i64 = admin
        .query_one("select count(*) from pg_shdepend where refobjid = $1::text::regrole and deptype = 'o'", &[&SERVE_ROLE])
        .await?
        .get(0);
    assert_eq!(owned, 0, "the serve role owns nothing");
    Ok(())
}

#[tokio::test]
async fn p10_the_serve_role_reads_and_writes_nothing_of_the_application_by_itself() -> Result<()> {
    let postgres = prepared().await?;
    let serve = postgres.connect_as(SERVE_ROLE).await?;
    for refused in [
        "select * from patients",
        "select count(*) from public_list",
        "select * from books.accounts",
        "insert into patients values (2, null, 'x')",
        "update patients set name = 'x'",
        "delete from patients",
        "truncate patients",
        "select nextval('invoice_numbers')",
        "select wipe()",
        "create table public.mine (id int)",
        "create table walcast.mine (id int)",
        "create schema mine",
        "create function walcast.f() returns int language sql as 'select 1'",
        "drop table walcast.state",
        "alter table patients disable row level security",
        "alter table patients replica identity full",
        "alter publication walcast add table patients",
        "create publication mine for table patients",
        "create role mine",
        "create database mine",
        "alter role walcast bypassrls",
        "alter role walcast superuser",
        "grant authenticated to anon",
        "grant select on patients to walcast",
        "insert into walcast.migrations (name) values ('x')",
        "alter system set wal_level = minimal",
        "copy (select 1) to program 'true'",
        "select pg_read_file('postgresql.conf')",
        "select lo_import('/etc/passwd')",
        "set role postgres",
        "set session authorization postgres",
    ] {
        let error = serve.batch_execute(refused).await.err().with_context(|| format!("the serve role may: {refused}"))?;
        let code = error.as_db_error().map(|error| error.code().code().to_owned());
        // 42501: no privilege; the rest of the list are privileges that PostgreSQL words otherwise.
        assert!(matches!(code.as_deref(), Some("42501" | "22023")), "{refused}: {error:?}");
    }
    // It may become the callers' roles, and is then as small as they are.
    let seen: i64 = {
        serve.batch_execute("begin; set local role authenticated; set local \"request.jwt.claims\" = '{}'").await?;
        let seen = serve.query_one("select count(*) from patients", &[]).await?.get(0);
        serve.batch_execute("rollback").await?;
        seen
    };
    assert_eq!(seen, 0, "without a subject nobody's row");
    let error =
        serve.batch_execute("begin; set local role anon; select * from patients").await.err().context("anon reads patients")?;
    assert_eq!(error.as_db_error().map(|error| error.code().code()), Some("42501"));
    serve.batch_execute("rollback").await?;
    Ok(())
}

/// Live updates, the cache in memory and in PostgreSQL, invalidation and the slot, with exactly those rights.
#[tokio::test]
async fn p10_everything_works_with_these_rights_and_without_any_extension() -> Result<()> {
    let postgres = prepared().await?;
    let server = Server::start(&postgres, &[]).await?;
    let service = server.token("service_role", None);
    let ada = server.token("authenticated", Some("00000000-0000-4000-8000-00000000000a"));
    let mut events = SseStream::open(&format!("{}/sse/v1/changes?table=patients", server.url), Some(&ada), None).await?;
    assert_eq!(events.next(DEADLINE).await?.event, "live");
    postgres.execute("update patients set name = 'Ada L.' where id = 1").await?;
    let change = events.next_where(|event| event.event == "change", DEADLINE).await?.json()?;
    assert_eq!((&change["record"]["name"], &change["old_record"]["name"]), (&json!("Ada L."), &json!("Ada")));

    let http = reqwest::Client::new();
    let url = format!("{}/cache/v1/patients/1", server.url);
    let miss = http.get(&url).bearer_auth(&service).send().await?;
    let ticket = miss.headers()["walcast-ticket"].clone();
    let put =
        http.put(&url).bearer_auth(&service).header("walcast-ticket", ticket).header("cache-tag", "patients:id=1").body("1");
    assert_eq!(put.send().await?.text().await?, r#"{"stored":true}"#);
    let admin = postgres.connect().await?;
    walcast_testkit::wait::until(DEADLINE, "the value is in PostgreSQL too", async || {
        admin.query_one("select count(*) from walcast.cache_entries", &[]).await.is_ok_and(|row| row.get::<_, i64>(0) == 1)
    })
    .await?;
    let body = json!({ "tags": ["patients:id=1"] });
    let answer = http.post(format!("{}/cache/v1/invalidate", server.url)).bearer_auth(&service).json(&body).send().await?;
    assert_eq!(answer.status(), 200, "{}", answer.text().await?);
    assert_eq!(http.get(&url).bearer_auth(&service).send().await?.status(), 404);

    let extensions: i64 = admin.query_one("select count(*) from pg_extension where extname <> 'plpgsql'", &[]).await?.get(0);
    assert_eq!(extensions, 0);
    let others: i64 = admin
        .query_one(
            "select count(*) from pg_stat_activity where application_name like 'walcast%' and usename <> $1",
            &[&SERVE_ROLE],
        )
        .await?
        .get(0);
    assert_eq!(others, 0, "every connection is the serve role's");
    server.stop().await
}
