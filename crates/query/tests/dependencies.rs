//! What named queries depend on, when they may be kept, and what callers hear who ask wrongly.

mod clinic;

use clinic::{Clinic, claims, params, tags, user};
use walcast_model::TableName;
use walcast_query::{QueryError, Uncacheable};

const DASHBOARD: &str = "-- name: dashboard\n-- param: patient_id bigint\n\
    select v.id, v.pulse, p.name from vital_signs v join patients p on p.id = v.patient_id where v.patient_id = $1 order by v.id";

#[tokio::test]
async fn the_dashboard_of_patient_7_depends_on_patient_7_and_the_caller_only() {
    let clinic = Clinic::open().await;
    clinic
        .postgres
        .execute(&format!(
            "insert into patients values (7, null, 'Ann', null); insert into providers values (1, '{}', 'Bo'); \
             insert into assignments values (1, 7, 1); insert into vital_signs values (1, 7, 80)",
            user(1)
        ))
        .await
        .unwrap();
    let plan = clinic.plan(DASHBOARD, "authenticated").await;
    assert_eq!((&plan.cacheable, &plan.not_narrowed), (&Ok(()), &None));
    assert!(plan.dependencies.iter().all(|dependency| dependency.narrow.is_some()), "{:?}", plan.dependencies);

    let nurse = claims("authenticated", 1);
    let answer = clinic.run(DASHBOARD, &nurse, &[("patient_id", "7")]).await.unwrap();
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap(),
        serde_json::json!([{"id":1,"pulse":80,"name":"Ann"}])
    );
    assert_eq!(answer.rows, 1);
    let provider = format!("providers:user_id={}", user(1));
    let expected = [
        "assignments:patient_id=*",
        "assignments:patient_id=7",
        "patients:id=*",
        "patients:id=7",
        "providers:user_id=*",
        &provider,
        "vital_signs:patient_id=*",
        "vital_signs:patient_id=7",
    ];
    assert_eq!(tags(&answer), expected);
    // As PostgreSQL prints the column, however the caller wrote it.
    assert_eq!(tags(&clinic.run(DASHBOARD, &nurse, &[("patient_id", " +07 ")]).await.unwrap()), expected);

    let nobody = clinic.run(DASHBOARD, &claims("authenticated", 9), &[("patient_id", "7")]).await.unwrap();
    assert_eq!((nobody.rows, &nobody.body[..]), (0, &b"[]"[..]));
    let service = clinic.plan(DASHBOARD, "service_role").await;
    let tables: Vec<String> = service.dependencies.iter().map(|dependency| dependency.table.to_string()).collect();
    assert_eq!(tables, ["public.vital_signs", "public.patients"], "no row security, no policies' tables");
}

async fn reason(clinic: &Clinic, header: &str, sql: &str) -> String {
    let plan = clinic.plan(&format!("-- name: q\n{header}\n{sql}"), "authenticated").await;
    match &plan.cacheable {
        Ok(()) => "kept".into(),
        Err(error) => format!("{}: {error}", error.code()),
    }
}

#[tokio::test]
async fn an_answer_that_may_change_unheard_is_never_kept() {
    let clinic = Clinic::open().await;
    let sql = "create table hidden (id int primary key); create table half (id int primary key); \
        create materialized view mat as select * from hidden; create sequence seq; \
        create function secret() returns bigint language plpgsql stable as 'begin return (select count(*) from hidden); end'; \
        create function scalar() returns bigint language sql stable as 'select count(*) from hidden'; \
        create function twice(x bigint) returns bigint language sql immutable as 'select x * 2'; \
        create function late() returns timestamptz language sql stable as 'select now()'; \
        create function all_hidden() returns setof hidden language sql stable as 'select * from hidden'; \
        create view clocked as select id from patients where now() > '2020-01-01'; \
        create function app() returns text language sql stable as $f$ select current_setting('app.x', true) $f$; \
        alter publication walcast add table half where (id > 5); \
        grant select on all tables in schema public to authenticated; grant select on seq to authenticated;";
    clinic.postgres.execute(sql).await.unwrap();
    for (header, sql, expected) in [
        ("", "select * from patients", "kept"),
        (
            "",
            "select * from hidden",
            "unpublished: unpublished: public.hidden; alter publication \"walcast\" add table \"public\".\"hidden\"",
        ),
        ("", "select * from half", "unpublished"),
        ("", "select relname from pg_class", "unpublished: unpublished: pg_catalog.pg_class; the system catalogs"),
        ("", "select * from mat", "untracked: public.mat is a materialised view"),
        ("", "select last_value from seq", "untracked"),
        ("", "select secret() from patients", "opaque: `public.secret()` cannot be looked into"),
        ("-- depends: patients", "select secret() from patients", "kept"),
        ("-- depends: hidden", "select secret() from patients", "unpublished"),
        ("", "select scalar() from patients", "opaque"),
        ("", "select (values (scalar()))", "opaque"),
        ("", "select id from patients limit scalar()", "opaque"),
        ("", "select p.secret from (select 1 as secret) p", "kept"),
        ("", "select twice(id) from patients", "kept"),
        ("", "select * from all_hidden()", "unpublished"),
        ("", "select random() from patients", "volatile: `random()`"),
        ("-- max_age: 10s", "select gen_random_uuid()", "volatile"),
        ("", "select now()", "clock: `now()`"),
        ("-- max_age: 10s", "select now()", "kept"),
        ("", "select current_date", "clock"),
        ("", "select id from patients where current_timestamp > 'today'", "clock"),
        ("", "select 'now'::timestamptz", "clock"),
        ("", "select late() from patients", "clock"),
        ("", "select * from clocked", "clock"),
        ("", "select age(timestamp '2020-01-01')", "clock"),
        ("", "select current_setting('app.x', true)", "clock"),
        ("", "select app()", "clock"),
        ("", "select pg_backend_pid()", "clock"),
        ("", "select query_to_xml('select * from hidden', true, true, '')", "opaque"),
        (
            "",
            "select to_char(pulse, '999'), coalesce(pulse, 1), date_trunc('day', timestamptz '2020-01-01') from vital_signs",
            "kept",
        ),
        ("", "select * from pulses", "kept"),
    ] {
        let heard = reason(&clinic, header, sql).await;
        assert!(heard.starts_with(expected), "{sql}: {heard}");
    }
    clinic.postgres.execute("create policy odd on patients for select to authenticated using (secret() > 0)").await.unwrap();
    assert!(reason(&clinic, "", "select * from patients").await.starts_with("opaque"), "a policy's functions count too");
    assert!(reason(&clinic, "", "select * from vital_signs").await.starts_with("opaque"), "also a policy behind a policy");
}

async fn dependencies(clinic: &Clinic, sql: &str) -> String {
    let plan = clinic.plan(&format!("-- name: q\n-- param: id bigint\n{sql}"), "authenticated").await;
    let one = |dependency: &walcast_query::Dependency| match &dependency.narrow {
        None => dependency.table.table().to_owned(),
        Some((column, _)) => format!("{}:{column}", dependency.table.table()),
    };
    let mut all: Vec<String> = plan.dependencies.iter().map(one).collect();
    all.sort();
    all.join(" ")
}

#[tokio::test]
async fn views_partitions_children_and_functions() {
    let clinic = Clinic::open().await;
    let sql = "create table visits (id bigint, day int not null, primary key (id, day)) partition by list (day); \
        create table visits_1 partition of visits for values in (1); create table visits_2 partition of visits for values in (2); \
        create table parent (id bigint primary key); create table child (primary key (id)) inherits (parent); \
        create function visits_of(x bigint) returns setof visits language sql stable as 'select * from visits where id = x'; \
        create table loose (id text collate \"C\" primary key, f float8 unique, g bigint generated always as (1) stored unique); \
        create collation soft (provider = icu, locale = 'und', deterministic = false); \
        create table soft_t (id text collate soft primary key, k bigint unique); \
        grant select on all tables in schema public to authenticated;";
    // Not every PostgreSQL has ICU.
    let sql = if clinic
        .client
        .query_one("select count(*) from pg_collation where collprovider = 'i'", &[])
        .await
        .unwrap()
        .get::<_, i64>(0)
        > 0
    {
        sql.to_owned()
    } else {
        sql.replace(
            "create collation soft (provider = icu, locale = 'und', deterministic = false);",
            "create collation soft from \"C\";",
        )
    };
    let icu = sql.contains("provider = icu");
    clinic.postgres.execute(&sql).await.unwrap();
    for (sql, expected) in [
        ("select * from visits where id = $1", "visits:id"),
        ("select * from visits_1 where id = $1", "visits:id"),
        ("select * from visits_1 where id = $1 union all select * from visits", "visits"),
        ("select * from parent where id = $1", "child parent"),
        ("select * from parent where id = $1 union all select * from child where id = $1", "child parent"),
        ("select * from visits_of($1)", "visits"),
        ("select * from visits_of($1) union all select * from visits where id = $1", "visits"),
        (
            "select * from open_alerts where patient_id = $1",
            "alerts:patient_id assignments:patient_id patients:id providers:user_id",
        ),
        ("select * from loose where id = $1::text", "loose:id"),
        ("select * from loose where f = $1", "loose"),
        ("select * from loose where g = $1", "loose"),
        ("select * from soft_t s, loose l where s.id = 'x' and l.id = s.id collate \"C\" and s.k = $1", "loose soft_t:k"),
        ("select * from soft_t s where s.id = $1::text", if icu { "soft_t" } else { "soft_t:id" }),
    ] {
        assert_eq!(dependencies(&clinic, sql).await, expected, "{sql}");
    }
    // A view that reads as its owner: the owner bypasses row security, yet the policies' tables are kept in sight.
    let pulses = dependencies(&clinic, "select * from pulses where patient_id = $1").await;
    assert!(pulses.ends_with("vital_signs:patient_id"), "{pulses}");
}

#[tokio::test]
async fn values_are_told_as_postgresql_prints_them() {
    let clinic = Clinic::open().await;
    let service = claims("service_role", 3);
    for (header, sql, given, expected) in [
        ("-- param: open bool", "select id from alerts where open = $1", "yes", "alerts:open=* alerts:open=t"),
        (
            "-- param: ids bigint[]",
            "select id from patients where id = any($1)",
            "{3,1,NULL,1}",
            "patients:id=* patients:id=1 patients:id=3",
        ),
        ("-- param: id int", "select id from alerts where patient_id in ($1, 2)", "5", ""),
        (
            "-- param: u uuid",
            "select id from patients where user_id = $1",
            "00000000000040008000000000000ABC",
            "patients:user_id=* patients:user_id=00000000-0000-4000-8000-000000000abc",
        ),
        ("-- param: k text", "select id from alerts where kind = $1", "a,b:c=*", "alerts:kind=%61"),
        ("-- param: t text", "select id from patients where tenant = nullif($1, '')::text", "", "patients:tenant=*"),
        (
            "-- param: x int",
            "select id from patients where tenant = auth.jwt() ->> 'tenant' and $1 = 1",
            "1",
            "patients:tenant=* patients:tenant=t1",
        ),
        ("-- param: x numeric", "select id from patients where id = $1", "1", "patients"),
    ] {
        let answer =
            clinic.run(&format!("-- name: q\n{header}\n{sql}"), &service, &[(header.split(' ').nth(2).unwrap(), given)]).await;
        let told = tags(&answer.unwrap()).join(" ");
        match expected {
            "" => assert_eq!(told, "alerts:patient_id=* alerts:patient_id=2 alerts:patient_id=5"),
            "alerts:kind=%61" => assert_eq!(told, "alerts:kind=* alerts:kind=a%2Cb%3Ac%3D%2A"),
            expected => assert_eq!(told, expected, "{sql}"),
        }
    }
    let long = "x".repeat(100);
    let file = "-- name: q\n-- param: k text\nselect id from alerts where kind = $1";
    assert_eq!(tags(&clinic.run(file, &service, &[("k", &long)]).await.unwrap()), ["alerts"]);
    // An out-of-range value finds nothing; telling its tag must not fail where the query does not.
    clinic.postgres.execute("create table small (id int2 primary key); grant select on small to service_role").await.unwrap();
    let file = "-- name: q\n-- param: k bigint\nselect id from small where id = $1";
    assert_eq!(tags(&clinic.run(file, &service, &[("k", "99999")]).await.unwrap()), ["small:id=*", "small:id=99999"]);
}

#[tokio::test]
async fn who_asks_wrongly_hears_what_to_mend() {
    let clinic = Clinic::open().await;
    let files = [
        "-- name: by_id\n-- param: id bigint\n-- roles: authenticated, outsider\nselect id from patients where id = $1",
        "-- name: many\n-- max_rows: 2\nselect * from generate_series(1, 3)",
        "-- name: slow\n-- param: n int = 1\nselect $1 from generate_series(1, 100000000000)",
        "-- name: divide\n-- param: n int\nselect 1 / $1 as x",
    ]
    .map(String::from);
    let parsed = files.iter().map(|text| walcast_query::NamedQuery::parse("q.sql", text).unwrap()).collect();
    let queries = walcast_query::Queries::new(parsed, clinic.pool.clone(), std::time::Duration::from_millis(700), "walcast");
    let ask = async |name: &str, role: &str, list: &[(&str, &str)]| {
        let question = queries.ask(name, &params(list));
        let error: QueryError = match question {
            Ok(question) => queries.run(&question, &claims(role, 1)).await.unwrap_err(),
            Err(error) => error,
        };
        (error.code(), format!("{error}; {}", error.hint()))
    };
    let check = |(code, text): (&str, String), expected: &str, part: &str| {
        assert_eq!(code, expected, "{text}");
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    };
    check(ask("by_ids", "authenticated", &[]).await, "unknown_query", "did you mean `by_id`?");
    check(ask("by_id", "service_role", &[("id", "1")]).await, "role_not_allowed", "service_role");
    check(ask("by_id", "outsider", &[("id", "1")]).await, "permission_denied", "permission denied for table patients");
    check(ask("by_id", "authenticated", &[]).await, "missing_parameter", "`id` (bigint)");
    check(ask("by_id", "authenticated", &[("id", "1"), ("idd", "1")]).await, "unknown_parameter", "did you mean `id`?");
    for bad in ["abc", "1; drop table patients", "99999999999999999999", "1 or 1=1", ""] {
        check(ask("by_id", "authenticated", &[("id", bad)]).await, "bad_parameter", "parameter `id`");
    }
    check(ask("many", "authenticated", &[]).await, "too_many_rows", "max_rows");
    check(ask("slow", "authenticated", &[]).await, "query_timeout", "700 ms");
    check(ask("divide", "authenticated", &[("n", "0")]).await, "query_refused", "division by zero (SQLSTATE 22012)");
    let question = queries.ask("divide", &params(&[("n", "1")])).unwrap();
    assert_eq!(queries.run(&question, &claims("authenticated", 1)).await.unwrap().0.rows, 1);

    let holder = (clinic.pool.lease("t").await.unwrap(), clinic.pool.lease("t").await.unwrap());
    drop(holder);
    clinic.postgres.stop_immediate().await.unwrap();
    check(ask("divide", "authenticated", &[("n", "1")]).await, "database_away", "try again");
}

#[tokio::test]
async fn plans_are_forgotten_when_a_table_moves() {
    let clinic = Clinic::open().await;
    let queries = clinic.queries(&[DASHBOARD.to_owned(), "-- name: other\nselect id from providers".to_owned()]);
    let before = queries.plan("dashboard", "authenticated").await.unwrap();
    let other = queries.plan("other", "authenticated").await.unwrap();
    clinic
        .postgres
        .execute(
            "create table rota (id bigint primary key); grant select on rota to authenticated; \
         drop policy p on assignments; create policy p on assignments for select using (id in (select id from rota))",
        )
        .await
        .unwrap();
    assert!(std::sync::Arc::ptr_eq(&before, &queries.plan("dashboard", "authenticated").await.unwrap()));
    queries.forget_plans_of(&TableName::new("public", "assignments"));
    let after = queries.plan("dashboard", "authenticated").await.unwrap();
    let reads = |plan: &walcast_query::Plan| plan.dependencies.iter().any(|d| d.table == TableName::new("public", "rota"));
    assert!(!reads(&before) && reads(&after));
    assert!(std::sync::Arc::ptr_eq(&other, &queries.plan("other", "authenticated").await.unwrap()));
    queries.forget_plans();
    assert!(!std::sync::Arc::ptr_eq(&other, &queries.plan("other", "authenticated").await.unwrap()));
    assert_eq!(other.cacheable, Ok::<(), Uncacheable>(()));
}
