//! What the doctor says of real servers, well and ill.

use walcast_engine::{
    doctor::{Expectations, Finding, Level, before_serve, check},
    migrate::{MigrateOptions, migrate},
};
use walcast_testkit::TestPostgres;

fn expectations() -> Expectations {
    Expectations {
        slot: "walcast".into(),
        publication_cache: "walcast".into(),
        publication_realtime: "supabase_realtime".into(),
        allowed_roles: ["anon", "authenticated", "service_role"].map(String::from).to_vec(),
        acknowledge_bytes: 64 << 20,
        max_connections: 12,
        jwt_secret_bytes: Some(48),
        tags: Vec::new(),
    }
}

fn at(findings: &[Finding], check: &str) -> Level {
    findings.iter().filter(|f| f.check == check).map(|f| f.level).max().unwrap_or_else(|| panic!("no {check} in {findings:#?}"))
}

fn mend(findings: &[Finding], check: &str) -> String {
    findings.iter().filter(|f| f.check == check).max_by_key(|f| f.level).and_then(|f| f.fix.clone()).unwrap_or_default()
}

async fn migrated(tables: &str) -> anyhow::Result<TestPostgres> {
    let server = TestPostgres::start().await?;
    server.execute(tables).await?;
    migrate(&server.url(), &MigrateOptions::default()).await?;
    Ok(server)
}

#[tokio::test]
async fn a_migrated_database_is_well() -> anyhow::Result<()> {
    let server = migrated("create table patients (id bigint primary key)").await?;
    server.execute("alter publication supabase_realtime add table patients").await?;
    let findings = check(Some(&server.url_as("walcast", "postgres")), &expectations()).await;
    let ill: Vec<_> = findings.iter().filter(|finding| finding.level != Level::Ok).collect();
    assert!(ill.is_empty(), "{ill:#?}");
    before_serve(&server.connect_as("walcast").await?, &expectations()).await?;
    Ok(())
}

#[tokio::test]
async fn a_server_that_keeps_too_little_wal_is_told_which_setting() -> anyhow::Result<()> {
    let server = TestPostgres::builder()
        .setting("wal_level", "replica")
        .setting("max_replication_slots", "1")
        .setting("max_slot_wal_keep_size", "-1")
        .start()
        .await?;
    server.execute("select pg_create_physical_replication_slot('other')").await?;
    let findings = check(Some(&server.url()), &expectations()).await;
    assert_eq!(at(&findings, "wal_level"), Level::Fail);
    assert!(mend(&findings, "wal_level").contains("alter system set wal_level = logical"));
    assert_eq!(at(&findings, "replication_slots"), Level::Fail);
    assert_eq!(at(&findings, "max_slot_wal_keep_size"), Level::Warn);
    assert_eq!(at(&findings, "migrations"), Level::Fail);
    assert_eq!(at(&findings, "publications"), Level::Fail);
    assert_eq!(at(&findings, "login_role"), Level::Warn, "superuser");
    let refusal = before_serve(&server.connect().await?, &expectations()).await.unwrap_err();
    assert_eq!(refusal.code(), "wal_level");
    assert!(refusal.hint().unwrap().contains("wal_level = logical"));
    Ok(())
}

#[tokio::test]
async fn serve_is_refused_with_the_missing_right() -> anyhow::Result<()> {
    let server = TestPostgres::start().await?;
    let refusal = before_serve(&server.connect().await?, &expectations()).await.unwrap_err();
    assert_eq!(refusal.code(), "migrations");
    migrate(&server.url(), &MigrateOptions::default()).await?;

    for (break_it, code, heal) in [
        ("alter role walcast noreplication", "replication", "alter role walcast replication"),
        ("revoke authenticated from walcast", "roles", "grant authenticated to walcast"),
        ("alter role authenticated bypassrls", "roles", "alter role authenticated nobypassrls"),
        ("revoke usage on schema walcast from walcast", "walcast_schema", "grant usage on schema walcast to walcast"),
        ("revoke delete on walcast.clock from walcast", "walcast_schema", "grant delete on walcast.clock to walcast"),
        (
            "alter publication walcast set (publish = 'insert')",
            "publications",
            "alter publication walcast set (publish = 'insert, update, delete, truncate')",
        ),
    ] {
        server.execute(break_it).await?;
        let refusal = before_serve(&server.connect_as("walcast").await?, &expectations()).await.unwrap_err();
        assert_eq!(refusal.code(), code, "{break_it}: {refusal}");
        let findings = check(Some(&server.url_as("walcast", "postgres")), &expectations()).await;
        assert_eq!(at(&findings, code), Level::Fail, "{break_it}");
        server.execute(heal).await?;
        before_serve(&server.connect_as("walcast").await?, &expectations()).await?;
    }
    Ok(())
}

#[tokio::test]
async fn publications_that_harm_are_named_with_their_cure() -> anyhow::Result<()> {
    let server = migrated("create table patients (id bigint primary key, name text)").await?;
    server
        .execute(
            "create table notes (body text); alter publication walcast add table notes;
             create table later (id int primary key);
             alter publication supabase_realtime add table patients (id)",
        )
        .await?;
    let url = server.url_as("walcast", "postgres");
    let findings = check(Some(&url), &expectations()).await;
    assert_eq!(at(&findings, "replica_identity"), Level::Fail);
    assert_eq!(at(&findings, "publication_conflicts"), Level::Warn);
    assert_eq!(at(&findings, "unpublished_tables"), Level::Warn);
    server.execute(&mend(&findings, "publication_conflicts")).await?;
    assert_eq!(at(&check(Some(&url), &expectations()).await, "publication_conflicts"), Level::Ok);

    server
        .execute("alter publication walcast drop table patients; alter publication walcast add table patients where (id > 5)")
        .await?;
    assert_eq!(at(&check(Some(&url), &expectations()).await, "publication_conflicts"), Level::Fail);
    Ok(())
}

#[tokio::test]
async fn the_slot_is_looked_at() -> anyhow::Result<()> {
    let server = migrated("create table patients (id bigint primary key)").await?;
    let url = server.url_as("walcast", "postgres");
    server.execute("select pg_create_logical_replication_slot('walcast', 'test_decoding')").await?;
    let findings = check(Some(&url), &expectations()).await;
    assert_eq!(at(&findings, "slot"), Level::Fail);
    server.execute("select pg_drop_replication_slot('walcast')").await?;
    server.execute("select pg_create_logical_replication_slot('walcast', 'pgoutput')").await?;
    assert_eq!(at(&check(Some(&url), &expectations()).await, "slot"), Level::Ok);
    Ok(())
}

#[tokio::test]
async fn no_database_is_one_clear_line() {
    let findings = check(None, &expectations()).await;
    assert_eq!(at(&findings, "connection"), Level::Fail);
    let findings =
        check(Some("postgresql://me:s3cret@127.0.0.1:1/x"), &Expectations { jwt_secret_bytes: None, ..expectations() }).await;
    assert_eq!(at(&findings, "connection"), Level::Fail);
    assert_eq!(at(&findings, "jwt_secret"), Level::Fail);
    assert!(!format!("{findings:?}").contains("s3cret"));
}
