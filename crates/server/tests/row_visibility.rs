//! P3: a client never hears a row, or a column of it, that PostgreSQL itself would not show to its role and claims; and,
//! policies being ordinary, it hears all that it may. Random writes, one at a time; after each the judge reads as everybody.

mod support;

#[path = "row_visibility/ears.rs"]
mod ears;
#[path = "row_visibility/judge.rs"]
mod judge;
#[path = "row_visibility/room.rs"]
mod room;
#[path = "row_visibility/writer.rs"]
mod writer;

use anyhow::{Context, Result, ensure};
use judge::{Identity, Kind, Sight, Touch, judge};
use rand::{Rng, seq::IndexedRandom};
use room::Room;
use serde_json::json;
use support::{DEADLINE, SECRET, Server, migrate};
use walcast_testkit::{RealtimeSocket, TestPostgres, Vsn};
use writer::{Subject, Writer, subject};

const ADA: &str = "00000000-0000-4000-8000-00000000000a";
const BOB: &str = "00000000-0000-4000-8000-00000000000b";

const OWNERS: &[&str] = &[
    "'00000000-0000-4000-8000-00000000000a'",
    "'00000000-0000-4000-8000-00000000000b'",
    "'00000000-0000-4000-8000-00000000000c'",
    "null",
];
const BODIES: &[&str] = &["'a'", "''", "'say \"x\", \\ and (y)'", "null", "E'two\\nlines\\ttab'", "'ünïcode 😀'"];
const TEAMS: &[&str] = &["1", "2", "3", "null"];
const FLAGS: &[&str] = &["true", "false", "null"];

const SUBJECTS: &[Subject] = &[
    subject("plain_owner", &[("owner", OWNERS), ("body", BODIES), ("amount", &["1.50", "-7", "null", "12345678901234"])]),
    subject("team_notes", &[("team", TEAMS), ("body", BODIES)]),
    subject("either", &[("owner", OWNERS), ("shared", FLAGS), ("hidden", FLAGS), ("body", BODIES)]),
    subject("by_claim", &[("tenant", TEAMS), ("grade", &["'x'", "'y'", "'o''z'", "null"]), ("body", BODIES)]),
    // What the function reads cannot be known, so a resync instead of an event is right; a leak never is.
    Subject { ordinary: false, ..subject("by_function", &[("team", TEAMS), ("body", BODIES)]) },
    subject("few_columns", &[("body", BODIES), ("secret", BODIES), ("holder", OWNERS)]),
    subject("parts", &[("region", &["'a'", "'b'"]), ("owner", OWNERS), ("body", BODIES)]),
    subject("locked", &[("body", BODIES)]),
    subject("altered", &[("owner", OWNERS), ("c", TEAMS), ("late", BODIES)]),
    Subject {
        key: "ID",
        ..subject(
            "Odd Näme",
            &[
                ("\"select\"", OWNERS),
                ("\"Quo\"\"ted, (col)\"", &["'open'", "'closed'", "null", "'a\"b'"]),
                ("\"ünï côde\"", BODIES),
            ],
        )
    },
    subject(
        "lists",
        &[
            (
                "readers",
                &[
                    "array['00000000-0000-4000-8000-00000000000a']",
                    "'{}'",
                    "null",
                    "array['a\"b', 'c\\d', null, 'NULL', '{x}', '00000000-0000-4000-8000-00000000000b']",
                ],
            ),
            (
                "meta",
                &[
                    "'{\"readers\": [\"00000000-0000-4000-8000-00000000000b\"]}'",
                    "'{\"a\\\"\": \"b\\\\c\"}'",
                    "'[1, {\"x\": null}]'",
                    "null",
                ],
            ),
            ("words", &["array['\"', '\\', ',', ' ', '']", "'{}'", "array[['a','b'],['c','d']]"]),
        ],
    ),
    Subject {
        full: false,
        ..subject("keyed", &[("owner", OWNERS), ("body", BODIES), ("long", &["repeat('long ', 2000)", "'short'", "null"])])
    },
    Subject { ordinary: false, ..subject("recursive", &[("owner", OWNERS)]) },
    Subject { ordinary: false, ..subject("own_kind", &[("owner", OWNERS), ("kind", TEAMS)]) },
    subject("open", &[("body", BODIES)]),
];

fn identities() -> Vec<Identity> {
    let signed_in = |name, subject, claims| Identity { name, role: "authenticated", subject, claims };
    vec![
        signed_in("ada", Some(ADA), json!({ "tenant": 1, "app": { "grades": ["x", "o'z"] } })),
        signed_in("bob", Some(BOB), json!({ "tenant": "2", "app": { "grades": ["y", "x"] } })),
        signed_in("somebody without a subject", None, json!({ "tenant": 1 })),
        Identity { name: "anon", role: "anon", subject: None, claims: json!({}) },
        Identity { name: "service", role: "service_role", subject: None, claims: json!({}) },
    ]
}

fn seed() -> u64 {
    std::env::var("WALCAST_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| rand::rng().random_range(0..1_000_000))
}

#[tokio::test]
async fn p3_nobody_hears_a_row_that_postgresql_would_not_show_whatever_the_policies_are() -> Result<()> {
    let seed = seed();
    let postgres = TestPostgres::start().await?;
    let tables: Vec<&str> = SUBJECTS.iter().map(|subject| subject.table).chain(["members", "marks"]).collect();
    let quoted: Vec<String> = tables.iter().map(|table| format!("public.\"{table}\"")).collect();
    let quoted: Vec<&str> = quoted.iter().map(String::as_str).collect();
    migrate(&postgres, include_str!("row_visibility/hostile.sql"), &quoted).await?;
    let mut room = Room::open(&postgres, identities(), &tables).await?;
    let mut writer = Writer::new(seed);
    let mut teams: Vec<i64> = Vec::new();

    for round in 0..600 {
        // Every table in turn, so that none is left out by chance.
        let (mut sql, touch) = writer.write(SUBJECTS, round % SUBJECTS.len(), false);
        let mut touches = vec![touch];
        if writer.chance(20) {
            // Somebody joins or leaves a team: alone, or in the same transaction before or after the row.
            let (membership, moved) = move_membership(&mut writer, &mut teams);
            match writer.random.random_range(0..3) {
                0 => {
                    room.step(&membership, std::slice::from_ref(&moved)).await?;
                    let staff = format!("delete from hidden.staff; insert into hidden.staff values ('{ADA}', {})", 1 + round % 3);
                    room.step(&staff, &[]).await?;
                }
                order => {
                    sql = if order == 1 { format!("{membership}; {sql}") } else { format!("{sql}; {membership}") };
                    touches.iter_mut().for_each(|touch| touch.complete = false);
                    touches.push(moved);
                }
            }
        }
        room.step(&sql, &touches).await?;
    }
    println!(
        "seed {seed}: {} heard rightly, {} resyncs, {} leaks if unfiltered",
        room.right, room.resyncs, room.unfiltered_leaks
    );
    room.verdict(seed)?;
    room.server.stop().await
}

fn move_membership(writer: &mut Writer, teams: &mut Vec<i64>) -> (String, Touch) {
    let touch = |kind, id| Touch { table: "members".into(), key: "id", kind, before: id, after: id, full: true, complete: false };
    if teams.len() > 2 || (!teams.is_empty() && writer.chance(40)) {
        let id = teams.swap_remove(writer.random.random_range(0..teams.len()));
        return (format!("delete from public.members where id = {id}"), touch(Kind::Delete, id));
    }
    writer.next_id += 1;
    let id = writer.next_id;
    teams.push(id);
    let who = [ADA, BOB].choose(&mut writer.random).expect("two");
    let team = writer.random.random_range(1..4);
    (format!("insert into public.members values ({id}, {team}, '{who}')"), touch(Kind::Insert, id))
}

/// Who comes to a team is not told what its rows were before, nor of those that went with the same transaction.
#[tokio::test]
async fn p3_whoever_may_see_from_now_on_is_not_told_of_before() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    let tables = ["public.members", "public.team_notes", "public.own_kind", "public.marks"];
    migrate(&postgres, include_str!("row_visibility/hostile.sql"), &tables).await?;
    let mut room = Room::open(&postgres, identities(), &["members", "team_notes", "own_kind", "marks"]).await?;
    let touch = |table: &str, kind, id| Touch {
        table: table.into(),
        key: "id",
        kind,
        before: id,
        after: id,
        full: true,
        complete: false,
    };
    let note = |kind, id| touch("team_notes", kind, id);
    for (id, change, kind) in [
        (1, "update team_notes set body = 'new' where id = 1", Kind::Update),
        (2, "update team_notes set body = body where id = 2", Kind::Update),
        (3, "delete from team_notes where id = 3", Kind::Delete),
    ] {
        room.step(&format!("insert into team_notes values ({id}, {id}, 'old')"), &[note(Kind::Insert, id)]).await?;
        let joins = format!("insert into members values ({id}, {id}, '{ADA}')");
        let joined = touch("members", Kind::Insert, id);
        let both = if id == 2 { format!("{change}; {joins}") } else { format!("{joins}; {change}") };
        room.step(&both, &[note(kind, id), joined]).await?;
    }
    // The policy asks the table itself, by way of a function.
    for (sql, kind, id) in [
        (format!("insert into own_kind values (1, '{BOB}', 7)"), Kind::Insert, 1),
        (format!("update own_kind set owner = '{ADA}' where id = 1"), Kind::Update, 1),
        (format!("insert into own_kind values (2, '{BOB}', 7)"), Kind::Insert, 2),
        (format!("update own_kind set owner = '{BOB}' where id = 1"), Kind::Update, 1),
        ("delete from own_kind where id = 1".to_owned(), Kind::Delete, 1),
    ] {
        room.step(&sql, &[touch("own_kind", kind, id)]).await?;
    }
    ensure!(room.leaks.is_empty(), "{:#?}", room.leaks);
    ensure!(room.right > 20, "hardly anything was heard: {}", room.right);
    room.server.stop().await
}

const PATIENTS: &[&str] = &["1", "2", "3", "30"];
const PROVIDERS: &[&str] = &["1", "2"];
const CLINIC: &[Subject] = &[
    subject(
        "vital_signs",
        &[
            ("patient_id", PATIENTS),
            ("heart_rate", &["60", "180"]),
            ("systolic", &["120"]),
            ("diastolic", &["80"]),
            ("respiratory_rate", &["14"]),
            ("spo2", &["98", "80"]),
            ("temperature_c", &["36.6", "41.2"]),
        ],
    ),
    subject(
        "messages",
        &[
            ("patient_id", PATIENTS),
            ("provider_id", PROVIDERS),
            ("sender", &["'patient'", "'provider'"]),
            ("body", &["'hello'", "'\"quoted\" \\'"]),
        ],
    ),
    subject(
        "patient_alerts",
        &[
            ("patient_id", PATIENTS),
            ("severity", &["'info'", "'critical'"]),
            ("kind", &["'heart'"]),
            ("message", &["'look'", "''"]),
        ],
    ),
];

#[tokio::test]
async fn p3_in_the_clinic_a_patient_never_hears_of_another_patient() -> Result<()> {
    let seed = seed();
    let postgres = TestPostgres::start().await?;
    // The clinic publishes its tables itself.
    let schema = format!(
        "{}\n{}\n{}",
        include_str!("../../../demo/sql/0001_clinic.sql"),
        include_str!("../../../demo/sql/0002_people.sql"),
        "create table public.marks (n bigint primary key); grant select on public.marks to anon, authenticated, service_role;"
    );
    migrate(&postgres, &schema, &["public.marks"]).await?;
    let ids = postgres.connect().await?;
    let mut people = Vec::new();
    for (name, text) in
        [("patient 1", "patient:1"), ("patient 2", "patient:2"), ("provider 1", "provider:1"), ("provider 2", "provider:2")]
    {
        let id: String = ids.query_one("select md5('clinic:' || $1::text)::uuid::text", &[&text]).await?.get(0);
        people.push(Identity { name, role: "authenticated", subject: Some(id.leak()), claims: json!({}) });
    }
    people.push(Identity { name: "anon", role: "anon", subject: None, claims: json!({}) });
    people.push(Identity { name: "service", role: "service_role", subject: None, claims: json!({}) });

    let tables = ["vital_signs", "messages", "patient_alerts", "assignments", "patients", "marks"];
    let mut room = Room::open(&postgres, people, &tables).await?;
    let mut writer = Writer::new(seed);
    let mut assigned = true;
    for round in 0..240 {
        let (mut sql, touch) = writer.write(CLINIC, round % CLINIC.len(), true);
        let mut touches = vec![touch];
        if writer.chance(25) {
            // Provider 2 takes over patient 1, or is relieved: before, after, or together with the row.
            let id = 90_000;
            let touch =
                |kind| Touch { table: "assignments".into(), key: "id", kind, before: id, after: id, full: true, complete: false };
            let (move_sql, moved) = if assigned {
                room.client
                    .batch_execute("delete from assignments where provider_id = 2 and patient_id = 1 and id <> 90000")
                    .await?;
                (
                    "insert into assignments (id, provider_id, patient_id, started_at) overriding system value values (90000, 2, 1, now())",
                    touch(Kind::Insert),
                )
            } else {
                ("delete from assignments where id = 90000", touch(Kind::Delete))
            };
            assigned = !assigned;
            match writer.random.random_range(0..3) {
                0 => room.step(move_sql, &[moved]).await?,
                order => {
                    sql = if order == 1 { format!("{move_sql}; {sql}") } else { format!("{sql}; {move_sql}") };
                    touches.iter_mut().for_each(|touch| touch.complete = false);
                    touches.push(moved);
                }
            }
        }
        room.step(&sql, &touches).await?;
    }
    println!(
        "seed {seed}: {} heard rightly, {} resyncs, {} leaks if unfiltered",
        room.right, room.resyncs, room.unfiltered_leaks
    );
    room.verdict(seed)?;
    room.server.stop().await
}

const RULES: &str = "
create table public.marks (n bigint primary key);
grant select on public.marks to authenticated, service_role;
create table public.files (id bigint primary key, owner uuid, body text, diagnosis text);
alter table public.files enable row level security;
alter table public.files replica identity full;
create policy own on public.files for select to authenticated using (owner = auth.uid());
grant select on public.files to authenticated, service_role;";

/// Each change of the rules is followed at once, or in the same transaction, by a row that they decide.
#[tokio::test]
async fn p3_new_rules_hold_for_the_very_next_row() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, RULES, &["public.marks", "public.files"]).await?;
    let mut people = identities();
    people.retain(|who| ["ada", "bob", "service"].contains(&who.name));
    let mut room = Room::open(&postgres, people, &["files", "marks"]).await?;
    let mut id = 0;
    for rules in [
        "select 1",
        "alter policy own on files using (owner = auth.uid() and body <> 'open')",
        "alter policy own on files using (true)",
        "drop policy own on files",
        "create policy own on files for select to authenticated using (owner = auth.uid())",
        "revoke select on files from authenticated; grant select (id, owner, body) on files to authenticated",
        "create policy closed on files as restrictive for select to authenticated using (false)",
        "drop policy closed on files",
        "revoke select (body) on files from authenticated",
        "revoke all on files from authenticated",
        "grant select on files to authenticated",
        "alter table files disable row level security",
        "alter table files enable row level security",
        "alter table files rename column diagnosis to finding",
        "alter table files add column extra text default 'more'",
        "alter table files drop column finding",
    ] {
        for together in [false, true] {
            id += 1;
            if together {
                // Undone and done again, so that it moves in this transaction too.
                room.client.batch_execute("comment on table files is 'moved'").await?;
            } else {
                room.client.batch_execute(rules).await.context(rules)?;
            }
            room.columns.clear();
            let insert = format!("insert into files (id, owner, body) values ({id}, '{ADA}', 'open')");
            let touch =
                |kind| Touch { table: "files".into(), key: "id", kind, before: id, after: id, full: true, complete: false };
            room.step(&insert, &[touch(Kind::Insert)]).await.context(rules)?;
            room.step(&format!("update files set body = body where id = {id}"), &[touch(Kind::Update)]).await.context(rules)?;
            room.step(&format!("delete from files where id = {id}"), &[touch(Kind::Delete)]).await.context(rules)?;
        }
    }
    ensure!(room.leaks.is_empty(), "{:#?}", room.leaks);
    ensure!(room.right > 100, "hardly anything was heard: {}", room.right);
    room.server.stop().await
}

#[tokio::test]
async fn p3_rules_and_row_in_one_transaction_are_judged_by_the_new_rules() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, RULES, &["public.marks", "public.files"]).await?;
    let mut people = identities();
    people.retain(|who| ["ada", "bob", "service"].contains(&who.name));
    let mut room = Room::open(&postgres, people, &["files", "marks"]).await?;
    let touch =
        |id| Touch { table: "files".into(), key: "id", kind: Kind::Insert, before: id, after: id, full: true, complete: false };
    let insert = |id: i64| format!("insert into files values ({id}, '{ADA}', 'body', 'diagnosis')");
    // Rules are known and remembered from here on.
    room.step(&insert(1), &[touch(1)]).await?;
    ensure!(room.right > 0, "ada hears her own row");
    for (id, rules) in [
        (10, "alter policy own on files using (false)"),
        (20, "alter policy own on files using (owner = auth.uid())"),
        (30, "revoke select on files from authenticated; grant select (id, owner) on files to authenticated"),
        (40, "grant select on files to authenticated"),
        (50, "drop policy own on files"),
    ] {
        room.columns.clear();
        // The privileges that the judge goes by are those after the commit.
        let sql = format!("{rules}; {}", insert(id));
        let before = room.sights(&[touch(id)], false).await?;
        drop(before);
        room.client.batch_execute(&format!("begin; {sql}; rollback")).await?;
        room.columns.clear();
        let client = postgres.connect().await?;
        client.batch_execute(&format!("begin; {sql}; commit")).await?;
        let after = room.sights(&[touch(id)], true).await?;
        room.mark += 1;
        client.batch_execute(&format!("insert into marks values ({})", room.mark)).await?;
        for (at, after) in after.into_iter().enumerate() {
            let sight = Sight { before: None, after: after[0].clone(), columns: room.columns[&(at, "files".into())].clone() };
            for ear in &mut room.ears[at] {
                let heard = ear.until_mark(room.mark).await?;
                room.leaks.extend(judge(&[touch(id)], std::slice::from_ref(&sight), &heard.changes, true).leaks);
            }
        }
    }
    ensure!(room.leaks.is_empty(), "{:#?}", room.leaks);
    room.server.stop().await
}

#[tokio::test]
async fn p3_a_filter_on_a_column_that_may_not_be_read_tells_nothing() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    let schema =
        format!("{RULES} revoke select on files from authenticated; grant select (id, owner) on files to authenticated;");
    migrate(&postgres, &schema, &["public.marks", "public.files"]).await?;
    let server = Server::start(&postgres, &[]).await?;
    let ada = identities().remove(0).token(SECRET);
    let mut socket = RealtimeSocket::connect(&server.url, &ada, Vsn::V2).await?;
    let named =
        json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "files", "filter": "diagnosis=eq.flu" }] });
    let refused = socket.join("realtime:named", named, None).await?;
    assert_eq!(refused["status"], "error", "{refused}");
    assert!(refused["response"]["reason"].as_str().unwrap_or_default().contains("may not read column `diagnosis`"), "{refused}");

    // The same by way of a whole schema, where no table is looked at when subscribing.
    let wide = json!({ "postgres_changes": [
        { "event": "*", "schema": "public", "filter": "diagnosis=eq.flu" },
        { "event": "*", "schema": "public", "table": "marks" },
    ] });
    let joined = socket.join("realtime:wide", wide, None).await?;
    postgres.execute(&format!("insert into files values (1, '{ADA}', 'b', 'flu'); insert into marks values (1)")).await?;
    if joined["status"] == "ok" {
        let frame = socket.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?;
        assert_eq!(frame.payload["data"]["table"], "marks", "an event tells that the diagnosis is flu: {}", frame.payload);
    }
    server.stop().await
}
