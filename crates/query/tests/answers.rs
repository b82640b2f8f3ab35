//! Pages, batches and streams give the rows that the query alone gives; and what `check` says of a file.

mod clinic;

use std::collections::HashMap;

use clinic::{Clinic, claims, params, tags};
use walcast_query::{NamedQuery, Queries, Question, check};

fn question(queries: &Queries, list: &[(&str, &str)]) -> Question {
    let name = queries.all().next().unwrap().name.clone();
    queries.ask(&name, &params(list)).unwrap()
}

fn rows(body: &[u8]) -> Vec<serde_json::Value> {
    serde_json::from_slice(body).unwrap()
}

/// All rows, page after page; `between` happens after each page.
async fn all_pages(
    queries: &Queries,
    role: &str,
    list: &[(&str, &str)],
    mut between: impl AsyncFnMut(usize),
) -> Vec<serde_json::Value> {
    let (mut all, mut after, mut pages) = (Vec::new(), None::<String>, 0);
    loop {
        let mut asked: HashMap<String, String> = params(list);
        asked.extend(after.take().map(|after| ("after".to_owned(), after)));
        let name = queries.all().next().unwrap().name.clone();
        let (answer, _) = queries.run(&queries.ask(&name, &asked).unwrap(), &claims(role, 1)).await.unwrap();
        all.extend(rows(&answer.body));
        pages += 1;
        assert!(pages < 1000, "the pages never end");
        between(pages).await;
        match answer.next {
            Some(next) => after = Some(next),
            None => return all,
        }
    }
}

const NOTES: &str = "create table notes (id bigint primary key, of bigint not null, rank int, word text);
    create index on notes (of); grant select on notes to authenticated, service_role;
    insert into notes select n, n % 2, nullif(n % 4, 0), case when n % 5 = 0 then null else 'w' || n % 3 end
    from generate_series(1, 60) n; alter publication walcast add table notes";

#[tokio::test]
async fn pages_together_are_the_whole_answer_whatever_the_order_its_ties_and_its_nulls() {
    let clinic = Clinic::open().await;
    clinic.postgres.execute(NOTES).await.unwrap();
    let orders = [
        "id",
        "id desc",
        "rank desc, id",
        "rank, id desc",
        "rank nulls first, word desc nulls last, id",
        "word desc, rank desc nulls last, id desc",
    ];
    for order in orders {
        let whole = clinic.client.query(&format!("select id from notes where of = 1 order by {order}"), &[]).await.unwrap();
        let whole: Vec<i64> = whole.iter().map(|row| row.get(0)).collect();
        for size in [1, 2, 7, 30, 31] {
            let file = format!("-- name: n\n-- param: of bigint\n-- page: {size} by {order}\nselect * from notes where of = $1");
            let queries = clinic.queries(&[file]);
            let all = all_pages(&queries, "service_role", &[("of", "1")], async |_| {}).await;
            let ids: Vec<i64> = all.iter().map(|row| row["id"].as_i64().unwrap()).collect();
            assert_eq!(ids, whole, "{order}, {size} a page");
        }
    }
    // The query's own ORDER BY counts where the header names none, and each page is narrowed as the whole is.
    let queries = clinic.queries(&[
        "-- name: n\n-- param: of bigint\n-- page: 4\nselect * from notes where of = $1 order by rank desc, id".into(),
    ]);
    let (answer, plan) =
        queries.run(&question(&queries, &[("of", "1"), ("limit", "3")]), &claims("service_role", 1)).await.unwrap();
    assert_eq!((answer.rows, rows(&answer.body).len(), answer.next.is_some()), (3, 3, true));
    assert_eq!(tags(&answer), ["notes:of=*", "notes:of=1"]);
    assert!(plan.cacheable.is_ok());
}

#[tokio::test]
async fn a_row_is_on_one_page_only_while_others_are_inserted_and_deleted_between_the_pages() {
    let clinic = Clinic::open().await;
    clinic.postgres.execute(NOTES).await.unwrap();
    let queries = clinic.queries(&["-- name: n\n-- page: 5 by id desc\nselect id from notes".into()]);
    let all = all_pages(&queries, "service_role", &[], async |page| {
        let sql = format!("insert into notes values ({}, 0); delete from notes where id = {}", 1000 + page, 61 - page * 5);
        clinic.postgres.execute(&sql).await.unwrap();
    })
    .await;
    let ids: Vec<i64> = all.iter().map(|row| row["id"].as_i64().unwrap()).collect();
    assert_eq!(ids, (1..=60).rev().collect::<Vec<_>>(), "each page's last row goes, new ones come at the front: the rest stays");
}

#[tokio::test]
async fn an_order_that_is_not_total_is_refused_and_a_cursor_chooses_only_a_place() {
    let clinic = Clinic::open().await;
    let sql = "create table loose (k int, v int not null); create unique index on loose (k); \
               create table tied (k int not null, v int not null); insert into tied select 1, 2 from generate_series(1, 3); \
               alter publication walcast add table loose, tied; grant select on loose, tied to authenticated, service_role";
    clinic.postgres.execute(&format!("{NOTES}; {sql}")).await.unwrap();
    for (file, expected) in [
        ("-- page: 5 by id\nselect id from notes", ""),
        ("-- page: 5 by n\nselect id as n from notes", ""),
        ("-- page: 5 by name, id\nselect p.id, p.name from patients p where p.id > 3", ""),
        ("-- page: 5 by id\nselect a.id, r.name from assignments a join providers r on r.id = a.provider_id", ""),
        ("-- page: 5 by id\nselect a.id from assignments a join providers r on a.id = 1", "whole unique key may repeat"),
        (
            "-- page: 5 by id\nselect p.id, a.id as other from patients p join assignments a on a.patient_id = p.id",
            "may repeat rows",
        ),
        ("-- page: 5 by rank\nselect rank from notes", "no whole unique key"),
        ("-- page: 5 by k\nselect k from loose", "no whole unique key"),
        ("-- page: 5 by id\nselect n.id + 0 as id from notes n", "no whole unique key"),
        ("-- page: 5 by id\nselect id, generate_series(1, 2) from notes", "repeats rows"),
        ("-- page: 5 by id\nselect distinct id from notes", "DISTINCT"),
        ("-- page: 5 by id\nselect id from notes union all select id from notes", "not one plain SELECT"),
        ("-- page: 5 by patient_id unique\nselect patient_id from pulses", ""),
        ("-- page: 5 by nope\nselect id from notes", "column \"nope\" does not exist"),
    ] {
        let queries = clinic.queries(&[format!("-- name: q\n{file}")]);
        let error = queries.plan("q", "service_role").await.map_or_else(|error| error.to_string(), |_| String::new());
        assert!(error.contains(expected) && error.is_empty() == expected.is_empty(), "{file}: {error:?}");
    }
    for file in [
        "-- page: 5\nselect id from notes",
        "-- page: 5 by id\nselect id from notes limit 3",
        "-- page: 2000 by id\nselect 1 as id",
    ] {
        assert!(NamedQuery::parse("q.sql", &format!("-- name: q\n{file}")).is_err(), "{file}");
    }
    // Vouched for, and untrue: said, not skipped.
    let queries = clinic.queries(&["-- name: q\n-- page: 5 by k unique\nselect k, v from tied".into()]);
    let error = queries.run(&question(&queries, &[]), &claims("service_role", 1)).await.unwrap_err();
    assert_eq!(error.code(), "no_total_order");
    // A cursor with values of no such type.
    let queries = clinic.queries(&["-- name: q\n-- page: 1 by id\nselect id from notes".into()]);
    let meaning = &queries.get("q").unwrap().meaning;
    let made_up = |value: &str| {
        use base64::Engine;
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(serde_json::json!([meaning, [value]]).to_string())
    };
    for value in ["x", "1 or true", "1; drop table notes"] {
        let asked = question(&queries, &[("after", &made_up(value))]);
        let error = queries.run(&asked, &claims("service_role", 1)).await.unwrap_err();
        assert_eq!(error.code(), "bad_cursor", "{value}: {error}");
    }
    let (answer, _) = queries.run(&question(&queries, &[("after", &made_up("59"))]), &claims("service_role", 1)).await.unwrap();
    assert_eq!((rows(&answer.body), answer.next), (vec![serde_json::json!({"id": 60})], None));
}

#[tokio::test]
async fn many_questions_in_one_statement_have_the_answers_and_the_tags_that_each_has_alone() {
    let clinic = Clinic::open().await;
    clinic.postgres.execute(NOTES).await.unwrap();
    clinic.postgres.execute("create type mood as enum ('good', 'bad')").await.unwrap();
    for (header, sql, sets) in [
        ("-- param: of bigint", "select * from notes where of = $1 order by rank desc, id", vec!["0", "1", " 2", "+01"]),
        ("-- param: of bigint\n-- tags: notes_of:{of}", "select count(*) as n from notes where of = $1", vec!["0", "01"]),
        (
            "-- param: ids bigint[]",
            "select id, word from notes where id = any ($1) order by id",
            vec!["{1,2}", "{}", "{3,null,99}"],
        ),
        ("-- param: w varchar(3)", "select id, '$1' as odd from notes where word = $1 order by id", vec!["w1", "w0", "w1xyz"]),
        ("-- param: c char(4)", "select $1 = 'ab'::bpchar as same, length($1::text)", vec!["ab", "a", "ab  "]),
        ("-- param: m mood", "select $1 as mood, $1 > 'good'::mood as bad", vec!["good", "bad"]),
        ("-- param: n numeric(4,1)", "select $1 as n", vec!["1.25", "2"]),
        (
            "-- param: n int",
            "with recursive r(i) as (select 1 union all select i + 1 from r where i < $1) select i from r",
            vec!["3", "1"],
        ),
        ("-- param: n bigint", "select id from notes order by id limit $1", vec!["2", "0", "5"]),
        ("-- param: t timestamptz", "select $1 as t", vec!["2026-01-02 03:04:05+02", "2026-01-02"]),
    ] {
        let queries = clinic.queries(&[format!("-- name: q\n{header}\n{sql}")]);
        let name = queries.get("q").unwrap().params[0].name.clone();
        let questions: Vec<Question> = sets.iter().map(|value| question(&queries, &[(&name, value)])).collect();
        let caller = claims("service_role", 1);
        let (together, _) = queries.run_many(&questions, &caller).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        assert_eq!(together.len(), sets.len());
        for ((one, asked), value) in together.into_iter().zip(&questions).zip(sets) {
            let (one, alone) = (one.unwrap(), queries.run(asked, &caller).await.unwrap().0);
            assert_eq!((one.body, &one.tags, one.rows), (alone.body, &alone.tags, alone.rows), "{sql} with {value}");
        }
    }
    // As the caller: row security holds for each of them.
    let queries = clinic.queries(&["-- name: q\n-- param: id bigint\nselect id from patients where id = $1".into()]);
    clinic
        .postgres
        .execute(&format!("insert into patients values (1, '{}', 'Me', null), (2, null, 'Other', null)", clinic::user(1)))
        .await
        .unwrap();
    let questions = ["1", "2"].map(|id| question(&queries, &[("id", id)]));
    let (answers, _) = queries.run_many(&questions, &claims("authenticated", 1)).await.unwrap();
    let bodies: Vec<_> = answers.into_iter().map(|answer| rows(&answer.unwrap().body).len()).collect();
    assert_eq!(bodies, [1, 0]);
    // One bad value fails all, so that the caller asks one by one; too many rows fail alone.
    let questions = ["1", "x"].map(|id| question(&queries, &[("id", id)]));
    assert!(queries.run_many(&questions, &claims("authenticated", 1)).await.is_err());
    let queries = clinic.queries(&["-- name: q\n-- param: n bigint\n-- max_rows: 2\nselect id from notes limit $1".into()]);
    let questions = ["2", "3"].map(|n| question(&queries, &[("n", n)]));
    let (answers, _) = queries.run_many(&questions, &claims("service_role", 1)).await.unwrap();
    assert!(answers[0].is_ok() && answers[1].as_ref().is_err_and(|error| error.code() == "too_many_rows"));
}

#[tokio::test]
async fn a_stream_has_every_row_as_a_line_and_its_own_error_at_the_place_where_it_happens() {
    let clinic = Clinic::open().await;
    let file = "-- name: q\n-- param: n bigint\n-- max_rows: 1\nselect i, 'a' || chr(10) || 'b' as t, 100 / (i - $1) as x \
                from generate_series(1, 40000) i";
    let queries = clinic.queries(&[file.into()]);
    let caller = claims("authenticated", 1);
    let mut stream = queries.stream(&question(&queries, &[("n", "0")]), &caller).await.unwrap();
    let (mut text, mut chunks) = (Vec::new(), 0);
    while let Some(chunk) = stream.next().await.unwrap() {
        assert!(chunk.len() < 2 << 20, "a chunk of {} bytes", chunk.len());
        text.extend_from_slice(&chunk);
        chunks += 1;
    }
    assert!(chunks > 3, "{chunks}");
    stream.end().await.unwrap();
    let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 40000);
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(lines[9]).unwrap(),
        serde_json::json!({"i": 10, "t": "a\nb", "x": 10})
    );

    let mut stream = queries.stream(&question(&queries, &[("n", "20000")]), &caller).await.unwrap();
    let mut before = 0;
    let error = loop {
        match stream.next().await {
            Ok(Some(chunk)) => before += chunk.iter().filter(|byte| **byte == b'\n').count(),
            Ok(None) => panic!("the stream ended as if all was there, after {before} rows"),
            Err(error) => break error,
        }
    };
    assert!(before > 0 && error.to_string().contains("division by zero"), "{before}: {error}");
    drop(stream);
    let error = queries.stream(&question(&queries, &[("n", "x")]), &caller).await.err().unwrap();
    assert_eq!(error.code(), "bad_parameter");
}

#[tokio::test]
async fn a_broken_file_is_told_with_its_line_and_its_mend() {
    let clinic = Clinic::open().await;
    let roles = ["authenticated", "service_role", "outsider"].map(String::from);
    for (text, expected) in [
        ("-- name: q\nselect id from patients", ""),
        (
            "-- name: q\n-- ttl: 5m\n\nselect id,\n       nam\nfrom patients",
            "q.sql:5: query `q` was refused by PostgreSQL: column \"nam\" does not exist",
        ),
        (
            "-- name: q\nselect 1\nfrom nowhere",
            "q.sql:3: query `q` was refused by PostgreSQL: relation \"nowhere\" does not exist (SQLSTATE 42P01); create the table first",
        ),
        ("-- name: q\n-- param: a nonsense\nselect $1", "type \"nonsense\" does not exist"),
        (
            "-- name: q\n-- roles: outsider\nselect id from patients",
            "q.sql:3: role `outsider`: query `q`: permission denied for table patients; grant the role SELECT",
        ),
        ("-- name: q\n-- roles: nurse\nselect 1", "`nurse` is in its roles; no token may name it"),
        ("-- name: q\n-- page: 3 by name\nselect name from patients", "its order holds no whole unique key"),
        ("-- name: q\n-- page: 3 by name\nselect name\nfrom patients\n", "no whole unique key of its table; end the order"),
        ("-- name: q\nselect 1 +", "q.sql:2"),
    ] {
        let queries = clinic.queries(&[text.to_owned()]);
        let wrong: Vec<String> = check(&queries, &roles).await.unwrap().iter().map(ToString::to_string).collect();
        match expected {
            "" => assert!(wrong.is_empty(), "{text}: {wrong:?}"),
            "its order holds no whole unique key" => assert_eq!(wrong.len(), 1, "{text}"),
            expected => assert!(wrong.len() == 1 && wrong[0].contains(expected), "{text}: {wrong:?}"),
        }
    }
}

#[tokio::test]
async fn advice_names_the_index_and_the_replica_identity_that_would_help() {
    let clinic = Clinic::open().await;
    let sql = "create table big (id bigint primary key, owner bigint not null, word text); \
               insert into big select n, n % 100, 'w' from generate_series(1, 5000) n; analyze big; \
               alter publication walcast add table big; grant select on big to authenticated";
    clinic.postgres.execute(sql).await.unwrap();
    let advise = async |file: &str| {
        let queries = clinic.queries(&[file.to_owned()]);
        let plan = queries.plan("q", "authenticated").await.unwrap();
        let advice = walcast_query::advise(&queries, queries.get("q").unwrap(), &plan).await.unwrap();
        advice.into_iter().map(|advice| format!("{}; {}", advice.what, advice.mend)).collect::<Vec<_>>().join("\n")
    };
    let text = advise("-- name: q\n-- param: o bigint\nselect id from big where owner = $1").await;
    assert!(text.contains("answers fall with any change of public.big: owner is known beforehand"), "{text}");
    assert!(text.contains("reads all 5000 rows of public.big to find those of one owner"), "{text}");
    assert!(text.contains("create index concurrently on \"public\".\"big\" (\"owner\")"), "{text}");
    clinic.postgres.execute("create index on big (owner)").await.unwrap();
    let text = advise("-- name: q\n-- param: o bigint\nselect id from big where owner = $1").await;
    assert!(text.contains("replica identity full") && !text.contains("create index"), "{text}");
    clinic.postgres.execute("alter table big replica identity full").await.unwrap();
    assert_eq!(advise("-- name: q\n-- param: o bigint\nselect id from big where owner = $1").await, "");
    assert_eq!(advise("-- name: q\n-- param: o bigint\nselect id from big where id = $1").await, "");
    let text = advise("-- name: q\nselect now() as t").await;
    assert!(text.contains("max_age"), "{text}");
}

#[tokio::test]
async fn only_what_is_the_same_for_everybody_is_called_so() {
    let clinic = Clinic::open().await;
    let sql = "create table prices (id bigint primary key, price int); grant select on prices to authenticated; \
               alter publication walcast add table prices; \
               create view mine as select id from prices where auth.uid() is not null; \
               create view owned as select id from patients; grant select on mine, owned to authenticated; \
               create function me() returns text language sql stable as 'select current_user::text'";
    clinic.postgres.execute(sql).await.unwrap();
    for (sql, expected) in [
        ("select * from prices", true),
        ("select now(), count(*) from prices", true),
        ("select * from patients", false),
        ("select *, auth.uid() from prices", false),
        ("select * from mine", false),
        ("select * from owned", false),
        ("select current_user, id from prices", false),
        ("select me(), id from prices", false),
        ("select id from prices where current_setting('request.jwt.claims', true) <> ''", false),
        ("select id from prices where has_table_privilege('patients', 'select')", false),
    ] {
        let plan = clinic.plan(&format!("-- name: q\n{sql}"), "authenticated").await;
        assert_eq!(plan.for_anyone, expected, "{sql}");
    }
}
