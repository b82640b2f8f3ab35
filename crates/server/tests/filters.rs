//! What a subscription asks for: every operator on every kind of column says what PostgreSQL itself says, wildcards and
//! selected columns are heard as asked, and what cannot be compared, shown or told is said.

mod support;

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, Server, migrate};
use walcast_testkit::{Frame, RealtimeSocket, TestPostgres, Vsn};

const SCHEMA: &str = r#"
create type ward as enum ('zulu', 'alpha');
create domain short as text check (length(value) < 10);
create table f (
  id bigint primary key, i int, n numeric, f float8, b boolean, t text, tc text collate "C", v varchar(20), ch char(6),
  ts timestamptz, d date, tm time, u uuid, w ward, j jsonb, ba bytea, ip inet, iv interval, dom short, arr int[], fl real);
create table nokey (n int);
create table hidden_key (id int primary key, n int);
create table large (id int primary key, short text, long text);
create table other (id int primary key, i int);
alter table nokey replica identity full;
grant select on f, nokey, large, other to authenticated;
grant select (n) on hidden_key to authenticated;"#;

const TABLES: &[&str] = &["f", "nokey", "hidden_key", "large", "other"];

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, TABLES).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

async fn socket(server: &Server) -> Result<RealtimeSocket> {
    RealtimeSocket::connect(&server.url, &server.token("authenticated", None), Vsn::V2).await
}

async fn heard(socket: &mut RealtimeSocket) -> Result<Value> {
    Ok(socket.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?.payload)
}

/// (filter, the same in SQL). Values that only a cast makes right are among them.
const FILTERS: &[(&str, &str)] = &[
    ("i=eq.007", "i = 7"),
    ("i=neq.7", "i <> 7"),
    ("i=lt.10", "i < 10"),
    ("i=gte.-3", "i >= -3"),
    ("i=in.(1,7,9)", "i in (1,7,9)"),
    ("i=not.in.(1,7,9)", "i not in (1,7,9)"),
    ("i=is.null", "i is null"),
    ("i=not.is.null", "i is not null"),
    ("i=isdistinct.7", "i is distinct from 7"),
    ("i=not.isdistinct.7", "i is not distinct from 7"),
    ("n=eq.1.5", "n = 1.5"),
    ("n=gt.1.05", "n > 1.05"),
    ("n=lte.-0.5", "n <= -0.5"),
    ("n=in.(1.500,2)", "n in (1.5, 2)"),
    ("f=eq.0", "f = 0"),
    ("f=gt.1e-3", "f > 0.001"),
    ("f=lt.NaN", "f < 'NaN'"),
    ("fl=eq.0.1", "fl = 0.1::real"),
    ("fl=gt.0.1", "fl > 0.1::real"),
    ("b=eq.true", "b"),
    ("b=eq.yes", "b"),
    ("b=is.true", "b is true"),
    ("b=not.is.true", "b is not true"),
    ("b=is.unknown", "b is unknown"),
    ("b=is.false", "b is false"),
    ("t=eq.Smith", "t = 'Smith'"),
    ("t=gt.a", "t > 'a'"),
    ("t=lt.B", "t < 'B'"),
    ("t=like.S%", "t like 'S%'"),
    ("t=like._mith", "t like '_mith'"),
    ("t=not.like.%é%", "t not like '%é%'"),
    ("t=ilike.sM%", "t ilike 'sM%'"),
    ("t=ilike.%É%", "t ilike '%É%'"),
    ("t=match.^S.*h$", "t ~ '^S.*h$'"),
    ("t=imatch.^s", "t ~* '^s'"),
    ("t=not.match.[[:digit:]]", "t !~ '[[:digit:]]'"),
    (r#"t=in.("a,b","c(d)")"#, "t in ('a,b', 'c(d)')"),
    (r#"t=eq."say \"hi\"""#, r#"t = 'say "hi"'"#),
    ("tc=gt.a", "tc > 'a'"),
    ("tc=lte.B", "tc <= 'B'"),
    ("v=eq.abc", "v = 'abc'"),
    ("v=like.a%", "v like 'a%'"),
    ("ch=eq.ab", "ch = 'ab'"),
    ("ch=like.ab%", "ch like 'ab%'"),
    ("ts=eq.2026-11-21 12:00:00+02", "ts = '2026-11-21 10:00:00+00'"),
    ("ts=lt.2026-11-21T10:00:00.5Z", "ts < '2026-11-21 10:00:00.5+00'"),
    ("ts=lt.infinity", "ts < 'infinity'"),
    ("d=gte.2026-01-01", "d >= '2026-01-01'"),
    ("d=eq.20261121", "d = '2026-11-21'"),
    ("tm=gt.09:00", "tm > '09:00'"),
    ("u=eq.00000000-0000-4000-8000-00000000000A", "u = '00000000-0000-4000-8000-00000000000a'"),
    ("u=gt.00000000-0000-4000-8000-000000000009", "u > '00000000-0000-4000-8000-000000000009'"),
    ("w=eq.zulu", "w = 'zulu'"),
    ("w=gt.zulu", "w > 'zulu'"),
    (r#"j=eq."{\"a\": 1.0}""#, r#"j = '{"a":1}'"#),
    ("ba=eq.\\x01ff", r"ba = '\x01ff'"),
    ("ip=eq.10.0.0.1", "ip = '10.0.0.1'"),
    ("ip=lt.10.0.0.2", "ip < '10.0.0.2'"),
    ("iv=eq.24:00:00", "iv = '24:00:00'"),
    ("dom=eq.x", "dom = 'x'"),
    ("dom=in.(x,y)", "dom in ('x','y')"),
    (r#"arr=eq."{1,2}""#, "arr = '{1,2}'"),
    ("i=gt.5,t=like.S%", "i > 5 and t like 'S%'"),
    ("i=eq.7,t=match.^S", "i = 7 and t ~ '^S'"),
];

const ROWS: &[&str] = &[
    "7, 1.50, 0, true, 'Smith', 'B', 'abc', 'ab', '2026-11-21 10:00:00+00', '2026-11-21', '10:00', '00000000-0000-4000-8000-00000000000a', 'zulu', '{\"a\":1.0}', '\\x01ff', '10.0.0.1', '1 day', 'x', '{1,2}', 0.1",
    "-3, -0.5, '-0', false, 'smith', 'a', 'abd', 'abc', '2026-11-21 10:00:00.45+00', '2025-12-31', '08:59:59.5', '00000000-0000-4000-8000-00000000000b', 'alpha', '{\"a\":2}', '\\x', '10.0.0.1/8', '23:59:59', 'y', '{}', 0.2",
    "null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null",
    "10, 2, 'NaN', true, 'a,b', 'C', '', '', 'infinity', 'infinity', '24:00', null, 'zulu', null, null, '10.0.0.2', null, 'z', null, 'NaN'",
    "9, 1.05, 1e-5, null, 'Éa 1', 'é', 'ABC', 'AB', '-infinity', '0044-03-15 BC', '09:00', '10000000-0000-4000-8000-000000000000', 'alpha', '{}', '\\x01', '::1', '1 mon', '', '{2,1}', 1e-30",
    "1, 'NaN', 'Infinity', false, 'say \"hi\"', '', 'a', 'ab', '10000-01-01 00:00:00+00', '10000-01-01', null, '00000000-0000-4000-8000-000000000009', null, '[]', '\\x01fe', '9.0.0.1', '-1 day', null, '{NULL}', 0",
];

/// Joins with as many bindings as there are filters; each change's `ids` are those whose SQL holds for the row.
#[tokio::test]
async fn p2_every_operator_on_every_type_says_what_postgresql_says() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let sql = postgres.connect().await?;
    let mut socket = socket(&server).await?;
    let bindings: Vec<Value> =
        FILTERS.iter().map(|(filter, _)| json!({ "event": "*", "schema": "public", "table": "f", "filter": filter })).collect();
    let answer = socket.join_ok("realtime:filters", json!({ "postgres_changes": bindings }), None).await?;
    let ids: Vec<u64> =
        answer["postgres_changes"].as_array().context("echoes")?.iter().filter_map(|b| b["id"].as_u64()).collect();
    ensure!(ids.len() == FILTERS.len(), "{answer}");
    for (at, row) in ROWS.iter().enumerate() {
        sql.batch_execute(&format!("insert into f values ({at}, {row})")).await?;
    }
    let expressions: Vec<String> = FILTERS.iter().map(|(_, sql)| format!("coalesce(({sql}), false)")).collect();
    let truth = format!("select array[{}] from f where id = $1", expressions.join(", "));
    let mut compared = 0;
    let mut matched = 0;
    for at in (0..ROWS.len() as i64).chain([2]) {
        if compared == ROWS.len() * FILTERS.len() {
            sql.batch_execute("update f set i = 7, t = 'Smith' where id = 2").await?;
        }
        let expected: Vec<bool> = sql.query_one(&truth, &[&at]).await?.get(0);
        let wanted: BTreeSet<u64> = ids.iter().zip(&expected).filter(|(_, holds)| **holds).map(|(id, _)| *id).collect();
        let told = if wanted.is_empty() {
            BTreeSet::new()
        } else {
            let change = heard(&mut socket).await?;
            ensure!(change["data"]["record"]["id"] == at, "the change of row {at}, not {change}");
            change["ids"].as_array().context("ids")?.iter().filter_map(Value::as_u64).collect()
        };
        for ((filter, _), id) in FILTERS.iter().zip(&ids) {
            ensure!(told.contains(id) == wanted.contains(id), "{filter} of row {at}: {} here", told.contains(id));
        }
        compared += FILTERS.len();
        matched += wanted.len();
    }
    ensure!(matched > FILTERS.len(), "only {matched} of {compared} hold: these rows try nothing");
    Ok(())
}

#[tokio::test]
async fn what_can_never_be_compared_is_refused_when_it_is_asked_for() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let mut socket = socket(&server).await?;
    for (filter, said) in [
        ("i=like.1%", "operator does not exist"),
        ("t=match.[", "invalid regular expression"),
        ("i=is.true", "argument of IS TRUE must be type boolean"),
        ("i=eq.1e3", "invalid input syntax for type integer"),
        ("dom=eq.much too long a text", "violates check constraint"),
        ("w=eq.nowhere", "invalid input value for enum"),
        ("i=in.(1,x)", "invalid input syntax for type integer"),
        ("i=is.maybe", "takes null, true, false or unknown"),
        ("i=in.1", "is not a list"),
        ("i=eq.1,,t=eq.x", "is not column=operator.value"),
        ("i=eqq.1", "there is no operator `eqq`"),
    ] {
        let config = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "f", "filter": filter }] });
        let answer = socket.join("realtime:refused", config, None).await?;
        let reason = answer["response"]["reason"].as_str().unwrap_or_default();
        ensure!(answer["status"] == "error" && reason.contains(said), "{filter}: {answer}");
    }
    for (select, table, said) in [
        (json!(["id", "absent"]), "f", "has no column `absent`"),
        (json!(["id"]), "hidden_key", "may not read column `id`"),
        (json!(["id"]), "*", "not with a wildcard"),
    ] {
        let config = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": table, "select": select }] });
        let answer = socket.join("realtime:refused", config, None).await?;
        ensure!(answer["response"]["reason"].as_str().unwrap_or_default().contains(said), "{table}: {answer}");
    }
    Ok(())
}

#[tokio::test]
async fn wildcards_and_selected_columns_are_heard_as_asked() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let mut socket = socket(&server).await?;
    let binding = |table: &str| json!({ "event": "INSERT", "schema": "public", "table": table });
    let mut filtered = binding("*");
    filtered["filter"] = json!("i=eq.7");
    let mut selected = binding("f");
    selected["select"] = json!(["t"]);
    let config = json!({ "postgres_changes": [binding("*"), filtered, selected] });
    let answer = socket.join_ok("realtime:wild", config, None).await?;
    let id = |at: usize| answer["postgres_changes"][at]["id"].clone();
    postgres.execute("insert into f (id, i, t) values (1, 7, 'x')").await?;
    // Once whole, once as selected: the key stands beside what was asked for.
    let (mut whole, mut part) = (heard(&mut socket).await?, heard(&mut socket).await?);
    if whole["ids"] == json!([id(2)]) {
        std::mem::swap(&mut whole, &mut part);
    }
    ensure!(whole["ids"] == json!([id(0), id(1)]) && whole["data"]["record"]["i"] == 7, "{whole}");
    ensure!(part["ids"] == json!([id(2)]) && part["data"]["record"] == json!({ "id": 1, "t": "x" }), "{part}");
    let columns: Vec<&str> =
        part["data"]["columns"].as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()).collect();
    ensure!(columns == ["id", "t"], "{part}");
    // A table without the filter's column is heard by the one without a filter.
    postgres.execute("insert into large (id) values (1); insert into other values (1, 8), (2, 7)").await?;
    for ids in [json!([id(0)]), json!([id(0)]), json!([id(0), id(1)])] {
        let change = heard(&mut socket).await?;
        ensure!(change["ids"] == ids, "{change}");
    }
    Ok(())
}

#[tokio::test]
async fn a_change_that_cannot_be_shown_is_told_as_upstream_tells_it() -> Result<()> {
    let (postgres, server) = serving(&[("WALCAST_REALTIME__CHANGE_BYTES", "4KiB")]).await?;
    let mut socket = socket(&server).await?;
    let binding = |table: &str| json!({ "event": "*", "schema": "public", "table": table });
    let config = json!({ "postgres_changes": [binding("nokey"), binding("hidden_key"), binding("large")] });
    socket.join_ok("realtime:unshown", config, None).await?;
    postgres.execute("insert into nokey values (1); insert into hidden_key values (1, 2)").await?;
    postgres.execute("insert into large values (1, 'short', repeat('x', 5000))").await?;
    for (table, error) in [("nokey", "Error 400: Bad Request, no primary key"), ("hidden_key", "Error 401: Unauthorized")] {
        let change = heard(&mut socket).await?;
        let data = &change["data"];
        ensure!(data["table"] == table && data["errors"] == json!([error]), "{change}");
        ensure!(data["columns"] == json!([]) && data["record"] == json!({}) && data["commit_timestamp"].is_null(), "{change}");
    }
    let change = heard(&mut socket).await?;
    let data = &change["data"];
    ensure!(data["errors"] == json!(["Error 413: Payload Too Large"]), "{change}");
    ensure!(data["record"] == json!({ "id": 1, "short": "short" }) && data["commit_timestamp"].is_string(), "{change}");
    Ok(())
}

#[tokio::test]
async fn p2_a_filter_on_a_column_whose_type_changed_says_so() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let mut socket = socket(&server).await?;
    let config = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "large", "filter": "short=eq.a" }] });
    socket.join_ok("realtime:retyped", config, None).await?;
    postgres.execute("insert into large values (1, 'a', 'x')").await?;
    ensure!(heard(&mut socket).await?["data"]["record"]["id"] == 1);
    postgres.execute("alter table large alter column short type char(4); update large set long = 'y' where id = 1").await?;
    let retyped = |frame: &Frame| {
        frame.event == "system" && frame.payload["message"].as_str().unwrap_or_default().contains("has another type now")
    };
    socket.next_where(retyped, DEADLINE).await?;
    Ok(())
}

/// A large value that an update left as it was is not in the stream: whoever filters on it is told, not passed over.
#[tokio::test]
async fn p2_a_filter_on_a_value_that_is_not_in_the_stream_is_no_silent_miss() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    // Stored out of line, and not compressed into it.
    postgres.execute("alter table large alter column long set storage external").await?;
    postgres.execute("insert into large values (1, 'a', repeat('x', 5000))").await?;
    let mut socket = socket(&server).await?;
    let filter = format!("long=eq.{}", "x".repeat(5000));
    let config = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "large", "filter": filter }] });
    socket.join_ok("realtime:toast", config, None).await?;
    postgres.execute("update large set short = 'b' where id = 1").await?;
    let told = socket.next_where(|frame| frame.event == "system" && frame.payload["status"] == "error", DEADLINE).await?;
    ensure!(told.payload["message"].as_str().unwrap_or_default().contains("REPLICA IDENTITY FULL"), "{told:?}");
    postgres.execute("alter table large replica identity full; update large set short = 'c' where id = 1").await?;
    // The row's own INSERT may have been settling when the topic was joined.
    let of_c = |frame: &Frame| frame.payload["data"]["record"]["short"] == "c";
    socket.next_where(of_c, DEADLINE).await?;
    postgres.execute("alter table large drop column long; update large set short = 'd' where id = 1").await?;
    let gone =
        |frame: &Frame| frame.event == "system" && frame.payload["message"].as_str().unwrap_or_default().contains("is gone");
    socket.next_where(gone, DEADLINE).await?;
    Ok(())
}
