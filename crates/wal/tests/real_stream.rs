//! What PostgreSQL really writes, decoded and assembled: each statement against the commit that it becomes.

mod decoded;

use std::sync::Arc;

use bytes::Bytes;
use decoded::{Decoded, changes, items};
use walcast_model::{Cell, Commit, Item, Operation, ReplicaIdentity, Row};

const SCHEMA: &str = "
create table patients (id int primary key, name text, note text);
create table beds (id int primary key, ward text not null);
create table logs (a text, b int);
alter table logs replica identity full;
create table named (code text not null, title text);
create unique index named_code on named (code);
alter table named replica identity using index named_code;
alter table patients alter note set storage external;
create schema \"Ünit\"; create table \"Ünit\".\"a \"\"b\" (id int primary key);
";

fn texts(row: &Row) -> Vec<Arc<str>> {
    let text = |cell: &Cell| match cell {
        Cell::Null => "NULL".into(),
        Cell::Unchanged => "UNCHANGED".into(),
        Cell::Absent => "ABSENT".into(),
        Cell::Value(_) => cell.text().expect("UTF-8").into(),
    };
    row.0.iter().map(text).collect()
}

/// Operation, old and new image of each change, `-` for none.
fn shown(commit: &Commit) -> Vec<String> {
    let row = |row: &Option<_>| row.as_ref().map_or("-".to_owned(), |row| texts(row).join(","));
    changes(commit)
        .iter()
        .map(|change| format!("{} {} {} -> {}", change.table.name, change.operation.name(), row(&change.old), row(&change.new)))
        .collect()
}

async fn check(decoded: &mut Decoded, sql: &str, expected: &[&str]) {
    assert_eq!(shown(&decoded.commit_of(sql).await), expected, "{sql}");
}

#[tokio::test]
async fn every_statement_becomes_its_change() {
    let mut decoded = Decoded::start(SCHEMA).await;
    let db = &mut decoded;
    check(db, "insert into patients values (1, 'Ann', null)", &["public.patients INSERT - -> 1,Ann,NULL"]).await;
    check(db, "update patients set name = 'Bob'", &["public.patients UPDATE 1,ABSENT,ABSENT -> 1,Bob,NULL"]).await;
    check(db, "update patients set id = 2", &["public.patients UPDATE 1,ABSENT,ABSENT -> 2,Bob,NULL"]).await;
    check(db, "delete from patients", &["public.patients DELETE 2,ABSENT,ABSENT -> -"]).await;
    check(db, "insert into logs values ('x', 1), (null, 2)", &["public.logs INSERT - -> x,1", "public.logs INSERT - -> NULL,2"])
        .await;
    check(db, "update logs set a = 'y' where b = 2", &["public.logs UPDATE NULL,2 -> y,2"]).await;
    check(db, "delete from logs where b = 1", &["public.logs DELETE x,1 -> -"]).await;
    check(db, "insert into named values ('k', 't')", &["public.named INSERT - -> k,t"]).await;
    check(db, "update named set title = null", &["public.named UPDATE k,ABSENT -> k,NULL"]).await;
    check(db, "update named set code = 'l'", &["public.named UPDATE k,ABSENT -> l,NULL"]).await;
    check(db, "delete from named", &["public.named DELETE l,ABSENT -> -"]).await;
    check(db, "insert into \"Ünit\".\"a \"\"b\" values (1)", &["Ünit.a \"b INSERT - -> 1"]).await;
    check(
        db,
        "truncate patients, beds restart identity cascade",
        &["public.patients TRUNCATE - -> -", "public.beds TRUNCATE - -> -"],
    )
    .await;
}

#[tokio::test]
async fn a_large_value_that_did_not_change_is_never_null() {
    let mut decoded = Decoded::start(SCHEMA).await;
    let long = "select string_agg(md5(n::text), '') from generate_series(1, 400) n";
    decoded.commit_of(&format!("insert into patients values (1, 'Ann', ({long}))")).await;
    check(&mut decoded, "update patients set name = 'Bob'", &["public.patients UPDATE 1,ABSENT,ABSENT -> 1,Bob,UNCHANGED"]).await;

    decoded.client.batch_execute("alter table patients replica identity full").await.unwrap();
    decoded.commits().await;
    let commit = decoded.commit_of("update patients set name = 'Cyd'").await;
    let change = changes(&commit)[0];
    assert_eq!(change.table.identity, ReplicaIdentity::Full);
    let (old, new) = (texts(change.old.as_ref().unwrap()), texts(change.new.as_ref().unwrap()));
    assert_eq!((&*old[1], &*new[1]), ("Bob", "Cyd"));
    assert_eq!(new[2].len(), 12_800);
    assert_eq!(old[2], new[2]);
}

#[tokio::test]
async fn a_large_key_that_did_not_change_is_known_in_both_images() {
    let mut decoded = Decoded::start(
        "create table t (k text not null, v int); alter table t alter k set storage external;
         create unique index t_k on t (k); alter table t replica identity using index t_k",
    )
    .await;
    let long = "select string_agg(md5(n::text), '') from generate_series(1, 80) n";
    decoded.commit_of(&format!("insert into t values (({long}), 1)")).await;
    let commit = decoded.commit_of("update t set v = 2").await;
    let change = changes(&commit)[0];
    let (old, new) = (texts(change.old.as_ref().unwrap()), texts(change.new.as_ref().unwrap()));
    assert_eq!((old[0].len(), &*old[1]), (2_560, "ABSENT"));
    assert_eq!((&new[0], &*new[1]), (&old[0], "2"));
}

#[tokio::test]
async fn indexes_count_changes_and_messages_and_the_commit_knows_its_xid_place_and_time() {
    let mut decoded = Decoded::start(SCHEMA).await;
    let before = decoded.client.query_one("select pg_current_wal_insert_lsn()::text", &[]).await.unwrap();
    let sql = "begin; insert into beds values (1, 'A');
               savepoint s; insert into beds values (2, 'A'); rollback to s;
               select pg_logical_emit_message(true, 'walcast', E'line\\nläst');
               select pg_logical_emit_message(false, 'walcast', 'not part of it');
               insert into patients values (1, 'Ann', null);
               savepoint s; insert into beds values (3, 'A');
               create temp table noted as select pg_current_xact_id()::text::bigint % (2::bigint ^ 32)::bigint as xid; commit;";
    let commit = decoded.commit_of(sql).await;
    let seen: Vec<_> = items(&commit)
        .iter()
        .map(|(index, item)| match item {
            Item::Change(change) => (*index, format!("{} {}", change.operation.name(), change.table.name)),
            Item::Message { prefix, content } => {
                assert_eq!(*content, Bytes::from_static("line\nläst".as_bytes()));
                (*index, format!("message {prefix}"))
            }
            Item::Redefined(table) => (*index, format!("described {}", table.name)),
        })
        .collect();
    let expected = [
        (0, "described public.beds"),
        (0, "INSERT public.beds"),
        (1, "message walcast"),
        (2, "described public.patients"),
        (2, "INSERT public.patients"),
        (3, "INSERT public.beds"),
    ];
    assert_eq!(seen, expected.map(|(index, text)| (index, text.to_owned())));
    assert_eq!(commit.end_index(), 4);

    let facts = "select xid, pg_current_wal_insert_lsn()::text, (extract(epoch from now()) * 1000000)::int8 from noted";
    let facts = decoded.client.query_one(facts, &[]).await.unwrap();
    assert_eq!(i64::from(commit.xid), facts.get::<_, i64>(0));
    let lsn = |row: &tokio_postgres::Row, at| row.get::<_, String>(at).parse().unwrap();
    assert!(lsn(&before, 0) <= commit.lsn && commit.lsn < commit.end_lsn && commit.end_lsn <= lsn(&facts, 1));
    let age_us = facts.get::<_, i64>(2) - commit.committed_at_us;
    assert!((0..600_000_000).contains(&age_us), "{age_us}");
}

#[tokio::test]
async fn a_schema_change_within_a_transaction_divides_its_rows() {
    let mut decoded = Decoded::start(SCHEMA).await;
    let sql = "begin; insert into beds values (1, 'A');
               alter table beds add born date; alter table beds rename ward to place; insert into beds values (2, 'B', '2001-02-03');
               alter table beds drop place; insert into beds values (3, null); commit";
    let commit = decoded.commit_of(sql).await;
    let expected = ["public.beds INSERT - -> 1,A", "public.beds INSERT - -> 2,B,2001-02-03", "public.beds INSERT - -> 3,NULL"];
    assert_eq!(shown(&commit), expected);
    let columns: Vec<Vec<&str>> =
        changes(&commit).iter().map(|change| change.table.columns.iter().map(|column| &*column.name).collect()).collect();
    assert_eq!(columns, [vec!["id", "ward"], vec!["id", "place", "born"], vec!["id", "born"]]);
    let described = items(&commit).iter().filter(|(_, item)| matches!(item, Item::Redefined(_))).count();
    assert_eq!(described, 3);
}

#[tokio::test]
async fn a_new_policy_describes_the_table_again_before_its_next_change() {
    let mut decoded = Decoded::start(SCHEMA).await;
    let sql = "insert into beds values (1, 'A'); insert into beds values (2, 'A');
               alter table beds enable row level security; create policy p on beds using (true); insert into beds values (3, 'A')";
    for statement in sql.split(';') {
        decoded.client.batch_execute(statement).await.unwrap();
    }
    let described: Vec<_> = decoded
        .commits()
        .await
        .iter()
        .filter(|commit| !changes(commit).is_empty())
        .map(|commit| items(commit).iter().filter(|(_, item)| matches!(item, Item::Redefined(_))).count())
        .collect();
    assert_eq!(described, [1, 0, 1]);
}

#[tokio::test]
async fn a_partitioned_table_speaks_through_its_root_when_the_publication_says_so() {
    let mut decoded = Decoded::start(
        "create table visits (id int, day date, primary key (id, day)) partition by range (day);
         create table visits_a partition of visits for values from ('2024-01-01') to ('2024-07-01');
         create table visits_b (day date not null, extra int, id int not null);
         alter table visits_b drop extra;
         alter table visits attach partition visits_b for values from ('2024-07-01') to ('2025-01-01')",
    )
    .await;
    decoded.client.batch_execute("alter publication p set (publish_via_partition_root = true)").await.unwrap();
    decoded.commits().await;
    let sql = "begin; insert into visits values (1, '2024-02-03'); update visits set day = '2024-08-09'; commit";
    let commit = decoded.commit_of(sql).await;
    assert!(changes(&commit).iter().all(|change| change.table.name.table() == "visits"));
    let last = changes(&commit).into_iter().next_back().unwrap();
    assert_eq!(last.operation, Operation::Insert, "moving to another partition is a delete and an insert");
    assert_eq!(texts(last.new.as_ref().unwrap()).join(","), "1,2024-08-09");
}
