//! What each construct narrows, and the traps where narrowing would hide a change.

use sqlparser::{ast::Statement, dialect::PostgreSqlDialect, parser::Parser};

use super::*;
use crate::known::{KnownColumn, KnownPolicy, Nature};

fn parse(sql: &str) -> Query {
    match Parser::parse_sql(&PostgreSqlDialect {}, sql).unwrap().remove(0) {
        Statement::Query(query) => *query,
        other => panic!("{other}"),
    }
}

fn policy(permissive: bool, using: &str) -> KnownPolicy {
    let expr = Parser::new(&PostgreSqlDialect {}).try_with_sql(using).unwrap().parse_expr().unwrap();
    KnownPolicy { permissive, applies: true, using: Some(Arc::new(expr)) }
}

/// `t(a!, b!, c, f float, name!)`: `!` is tagged.
fn table(known: &mut Known, name: &str, columns: &[(&str, &str, bool)], policies: Vec<KnownPolicy>) {
    let column = |(name, kind, tagged): &(&str, &str, bool)| KnownColumn {
        name: (*name).into(),
        family: Family::of(kind),
        tagged: *tagged,
    };
    let relation = KnownRelation {
        name: TableName::new("public", name),
        streamed: TableName::new("public", name),
        nature: Nature::Table,
        columns: columns.iter().map(column).collect(),
        secured: !policies.is_empty(),
        policies,
    };
    insert(known, name, relation);
}

fn view(known: &mut Known, name: &str, columns: &[&str], sql: &str, invoker: bool) {
    let columns = columns.iter().map(|name| KnownColumn { name: (*name).into(), family: None, tagged: false }).collect();
    let relation = KnownRelation {
        name: TableName::new("public", name),
        streamed: TableName::new("public", name),
        nature: Nature::View { query: Arc::new(parse(sql)), invoker },
        columns,
        secured: false,
        policies: Vec::new(),
    };
    insert(known, name, relation);
}

fn insert(known: &mut Known, name: &str, relation: KnownRelation) {
    let relation = Arc::new(relation);
    known.relations.insert((None, name.into()), relation.clone());
    known.relations.insert((Some("public".into()), name.into()), relation);
}

fn clinic() -> Known {
    let mut known = Known::default();
    let abc =
        [("id", "int8", true), ("k", "int8", true), ("plain", "int4", false), ("f", "float8", false), ("name", "text", true)];
    for name in ["a", "b", "c"] {
        table(&mut known, name, &abc, vec![]);
    }
    table(&mut known, "patients", &[("id", "int8", true), ("user_id", "uuid", true), ("tenant", "varchar", true)], vec![]);
    known
}

fn show(dependencies: &[Dependency]) -> String {
    let one = |dependency: &Dependency| match &dependency.narrow {
        None => dependency.table.table().to_owned(),
        Some((column, operands)) => {
            let values: Vec<&str> = operands.iter().map(|operand| operand.sql.as_str()).collect();
            format!("{}:{column}={}", dependency.table.table(), values.join("|"))
        }
    };
    let mut all: Vec<String> = dependencies.iter().map(one).collect();
    all.sort();
    all.join(" ")
}

/// $1 bigint, $2 uuid, $3 bigint[], $4 float8, $5 text.
fn found(known: &Known, sql: &str) -> String {
    let params: Vec<String> = ["bigint", "uuid", "bigint[]", "float8", "text"].map(String::from).into();
    match analyse(&parse(sql), &params, known).map(|analysis| analysis.dependencies) {
        Ok(dependencies) => show(&dependencies),
        Err(GivenUp(why)) => format!("given up: {why}"),
    }
}

fn check(sql: &str, expected: &str) {
    assert_eq!(found(&clinic(), sql), expected, "{sql}");
}

#[test]
fn a_column_equal_to_a_constant() {
    check("select * from a where id = $1", "a:id=$1");
    check("select * from a where $1 = a.id and name like 'x%'", "a:id=$1");
    check("select * from a x where x.id = 7", "a:id=7");
    check("select * from a where id = '7'", "a:id='7'");
    check("select * from a where id = -7", "a:id=-7");
    check("select * from a where id = $1::bigint", "a:id=$1::BIGINT");
    check("select * from public.a where public.a.id = $1", "a:id=$1");
    check("select * from patients where user_id = auth.uid()", "patients:user_id=auth.uid()");
    check("select * from patients where user_id = (select auth.uid())", "patients:user_id=(SELECT auth.uid())");
    check("select * from patients where tenant = auth.jwt() ->> 'tenant'", "patients:tenant=auth.jwt() ->> 'tenant'");
    check(
        "select * from patients where tenant = auth.jwt() -> 'app_metadata' ->> 'tenant'",
        "patients:tenant=auth.jwt() -> 'app_metadata' ->> 'tenant'",
    );
    check(
        "select * from patients where user_id = (nullif(current_setting('request.jwt.claim.sub', true), ''))::uuid",
        "patients:user_id=(nullif(current_setting('request.jwt.claim.sub', true), ''))::UUID",
    );
    check(
        "select * from patients where tenant = current_setting('request.jwt.claims', true)::json ->> 'tenant'",
        "patients:tenant=current_setting('request.jwt.claims', true)::JSON ->> 'tenant'",
    );
    check("select * from a where id in (1, 2, $1)", "a:id=1|2|$1");
    check("select * from a where id = any($3)", "a:id=$3");
    check("select * from a where id = any(array[1, $1])", "a:id=1|$1");
    check("select * from a where k in (1, 2) and id = 3", "a:id=3");
}

#[test]
fn what_casts_postgresql_prints_do_not_matter_and_others_do() {
    check(
        "select * from patients where (tenant)::text = (auth.jwt() ->> 'tenant'::text)",
        "patients:tenant=auth.jwt() ->> 'tenant'::TEXT",
    );
    check("select * from a where id::text = $5", "a");
    check("select * from a where id::int4 = $1", "a");
    check("select * from a where id::float8 = $4", "a");
    check("select * from patients where tenant::varchar(3) = 'abc'", "patients");
    check("select * from a where lower(name) = $5", "a");
    check("select * from a where name collate \"de\" = $5", "a");
}

#[test]
fn traps_of_a_single_table() {
    // A float parameter compares as float: many integers equal it.
    check("select * from a where id = $4", "a");
    check("select * from a where id = 1.5", "a");
    check("select * from a where id = null", "a");
    check("select * from a where plain = $1", "a");
    check("select * from a where id <> $1", "a");
    check("select * from a where not id = $1", "a");
    check("select * from a where not (id = $1 and k = 2)", "a");
    check("select * from a where id = $1 or k = 2", "a");
    check("select * from a where (id = $1) is not true", "a");
    check("select * from a where id is not distinct from $1", "a");
    check("select * from a where id not in (1, 2)", "a");
    check("select * from a where id <> all($3)", "a");
    check("select * from a where id in (1, k)", "a");
    check("select id = $1 from a", "a");
    check("select count(*) filter (where id = $1) from a", "a");
    check("select * from a group by id, k having id = $1", "a");
    check("select * from a where case when true then id = $1 end", "a");
    check("select * from a where id = current_setting('my.id')::bigint", "a");
    check("select * from a where id = random()", "a");
    check(
        "select * from a tablesample system (10) where id = 1",
        "given up: `a TABLESAMPLE SYSTEM (10)` in FROM is not understood",
    );
}

#[test]
fn joins_carry_equality_from_one_table_to_the_other() {
    check("select * from a join b on a.id = b.k where a.id = $1", "a:id=$1 b:k=$1");
    check("select * from a, b where a.id = b.k and b.k = $1", "a:id=$1 b:k=$1");
    check("select * from a join b using (id) where id = $1", "a:id=$1 b:id=$1");
    check("select * from a cross join b where a.id = $1", "a:id=$1 b");
    check("select * from a join b on a.plain = b.k where a.plain = $1", "a b:k=$1");
    check("select * from a join b on a.f = b.k where a.f = $1", "a b");
    check("select * from a join b on a.id = b.k join c on c.id = b.k and a.id = 3", "a:id=3 b:k=3 c:id=3");
    check("select * from a natural join b where id = $1", "a b");
    check("select * from a x join a y on x.id = y.k where x.id = $1", "a:id=$1 a:k=$1");
    check("select * from a, b where id = $1", "a b");
    check("select * from a join lateral (select * from b where b.k = a.id limit 1) x on true where a.id = $1", "a:id=$1 b:k=$1");
}

#[test]
fn on_of_an_outer_join_narrows_only_the_nullable_side() {
    check("select * from a left join b on b.k = a.id where a.id = $1", "a:id=$1 b:k=$1");
    check("select * from a left join b on a.id = $1 and b.k = $1", "a b:k=$1");
    check("select * from a left join b on b.k = a.id and b.k = $1", "a b:k=$1");
    check("select * from a right join b on a.id = $1 and b.k = $1", "a:id=$1 b");
    check("select * from a full join b on a.id = b.k and a.id = $1", "a b");
    check("select * from a full join b on a.id = b.k where a.id = $1", "a b");
    check("select * from a left join b on b.k = a.id where b.k = $1", "a b:k=$1");
    // Another outer join's ON is not believed.
    check("select * from a left join b on a.id = $1 left join c on c.id = a.id", "a b c");
    check("select * from a left join (b join c on b.id = c.id) on b.id = a.id where a.id = $1", "a:id=$1 b:id=$1 c:id=$1");
    check("select * from a left join b using (id) where id = $1", "a:id=$1 b:id=$1");
    check("select * from a full join b using (id) where id = $1", "a b");
    check(
        "select * from a left join lateral (select count(*) from b where b.k = a.id) x on true where a.id = $1",
        "a:id=$1 b:k=$1",
    );
}

#[test]
fn an_aggregate_of_nothing_is_still_a_row() {
    // count(*) answers 0 for every other a, so a is not narrowed by what is inside.
    check("select * from a, lateral (select count(*) from b where b.k = a.id and b.k = $1) x", "a b:k=$1");
    check("select * from a, lateral (select b.id from b where b.k = a.id and b.k = $1) x", "a:id=$1 b:k=$1");
    check("select * from a, lateral (select max(b.id) from b where b.k = a.id and b.k = $1 group by ()) x", "a b:k=$1");
}

#[test]
fn sub_queries_hold_what_holds_around_them() {
    check("select * from a where id = $1 and exists (select 1 from b where b.k = a.id)", "a:id=$1 b:k=$1");
    check("select * from a where id = $1 and not exists (select 1 from b where b.k = a.id)", "a:id=$1 b:k=$1");
    check("select (select max(b.f) from b where b.k = a.id) from a where id = $1", "a:id=$1 b:k=$1");
    check("select * from a where id = $1 and id in (select k from b)", "a:id=$1 b:k=$1");
    check("select * from a where id = $1 and id in (select k from b group by k)", "a:id=$1 b:k=$1");
    check("select * from a where id = $1 and id in (select max(k) from b)", "a:id=$1 b");
    check("select * from a where id = $1 and id in (select k from b limit 5)", "a:id=$1 b");
    check("select * from a where id = $1 and id in (select k from b union select id from c)", "a:id=$1 b c");
    check("select * from a where id = $1 and id not in (select k from b)", "a:id=$1 b");
    check("select * from a where id = $1 and id not in (select k from b where k = 5)", "a:id=$1 b:k=5");
    check("select * from a where id in (select k from b where id = $1)", "a b:id=$1");
    check("select * from a where id = $1 order by (select name from b where b.k = a.id)", "a:id=$1 b:k=$1");
    check("select * from a where id = (select k from b where id = $1)", "a b:id=$1");
}

#[test]
fn branches_keep_their_equalities_to_themselves() {
    check("select * from a where (id = $1 and exists (select 1 from b where b.k = a.id)) or k = 2", "a b:k=$1");
    check("select * from a where id = $1 or exists (select 1 from b where b.k = a.id)", "a b");
    // Under NOT a null is not the same as false, so nothing inside is believed.
    check("select * from a where not (id = $1 and exists (select 1 from b where b.k = a.id))", "a b");
    check("select (id = $1 and exists (select 1 from b where b.k = a.id)) from a", "a b");
    check("select case when id = $1 then (select name from b where b.k = a.id) end from a", "a b");
}

#[test]
fn derived_tables_and_ctes_hand_columns_through() {
    check("select * from (select * from a) x where x.id = $1", "a:id=$1");
    check("select * from (select id as z, k from a) x where z = $1", "a:id=$1");
    check("select * from (select distinct id from a) x where id = $1", "a:id=$1");
    check("select * from (select id, count(*) n from a group by id) x where id = $1", "a:id=$1");
    check("select * from (select id, max(k) as k from a group by id) x where k = $1", "a");
    check("select * from (select id, k from a group by rollup(id, k)) x where id = $1", "a");
    check("select * from (select id, k from a group by grouping sets ((id), (k))) x where id = $1", "a");
    check("select * from (select * from a limit 10) x where id = $1", "a");
    check("select * from (select * from a offset 1) x where id = $1", "a");
    check("select * from (select distinct on (k) * from a order by k) x where id = $1", "a");
    check("select * from (select *, row_number() over (order by k) n from a) x where id = $1", "a");
    check("select *, rank() over (order by k) from a where id = $1", "a:id=$1");
    check("select * from (select id from a union all select id from b) x where id = $1", "a b");
    check("select id from a where id = $1 union select id from b where k = 2", "a:id=$1 b:k=2");
    check("with x as (select * from a) select * from x where id = $1", "a:id=$1");
    check("with x(z) as (select id from a) select * from x p join x q on p.z = q.z where p.z = $1", "a:id=$1");
    check("with x as (select * from a) select * from x where id = $1 union all select * from x", "a");
    check("with a as (select * from a where id = $1) select * from a", "a:id=$1");
    check("with x as materialized (select * from a where id = $1) select * from b join x on x.id = b.k", "a:id=$1 b:k=$1");
    check(
        "select * from a where id = $1 and exists (with y as (select * from b where b.k = a.id) select 1 from y)",
        "a:id=$1 b:k=$1",
    );
}

#[test]
fn a_recursive_cte_narrows_only_what_it_states_itself() {
    check(
        "with recursive t as (select id, k from a where id = $1 union all select a.id, a.k from a join t on a.k = t.id) select * from t",
        "a",
    );
    check(
        "with recursive t as (select k as id from a where id = $1 union all select b.id from t, b where b.k = 5) select * from t where id = 3",
        "a:id=$1 b:k=5",
    );
}

#[test]
fn a_cte_means_its_names_where_it_stands() {
    // `k` inside x is c's, although a, where x is used, has a k too.
    check(
        "select * from c where exists (with x as (select b.id from b where b.id = c.k) select 1 from a where a.k = $1 and exists (select 1 from x))",
        "a:k=$1 b c",
    );
}

#[test]
fn a_condition_sees_only_its_own_join() {
    // `id` in ON is not z's, which stands beside the join.
    check(
        "select 1 from a where exists (select 1 from (select k from b) x join (select k as kk from b) y on x.k = name::int, c z where z.id = $1)",
        "a b c:id=$1",
    );
}

#[test]
fn views_are_looked_through() {
    let mut known = clinic();
    view(&mut known, "v", &["vid", "vk"], "select x.id, x.k from public.a x where x.f > 0", false);
    view(&mut known, "sums", &["id", "n"], "select a.id, count(*) as n from public.a group by a.id", true);
    assert_eq!(found(&known, "select * from v where vid = $1"), "a:id=$1");
    assert_eq!(found(&known, "select * from sums where id = $1"), "a:id=$1");
    assert_eq!(found(&known, "select * from sums where n = $1"), "a");
}

#[test]
fn policies_read_tables_too_and_narrow_their_own() {
    let mut known = clinic();
    let vitals = [("id", "int8", true), ("patient_id", "int8", true)];
    let own = "(patient_id in (select patients.id from public.patients where (patients.user_id = auth.uid()))) or (exists (select 1 \
               from (public.b join public.c on ((c.id = b.id))) where ((b.k = vitals.patient_id) and (c.k = 5))))";
    table(&mut known, "vitals", &vitals, vec![policy(true, own)]);
    assert_eq!(
        found(&known, "select * from vitals v where v.patient_id = $1"),
        "b:k=$1 c:k=5 patients:id=$1 vitals:patient_id=$1"
    );
    assert_eq!(found(&known, "select * from vitals"), "b c:k=5 patients:user_id=auth.uid() vitals");

    table(&mut known, "mine", &vitals, vec![policy(true, "patient_id = 3")]);
    assert_eq!(found(&known, "select * from mine"), "mine:patient_id=3");
    assert_eq!(found(&known, "select * from b left join mine on mine.patient_id = b.k"), "b mine:patient_id=3");

    table(&mut known, "either", &vitals, vec![policy(true, "patient_id = 3"), policy(true, "id = 4")]);
    assert_eq!(found(&known, "select * from either"), "either");
    table(&mut known, "both", &vitals, vec![policy(true, "true"), policy(true, "id = 4"), policy(false, "patient_id = 3")]);
    assert_eq!(found(&known, "select * from both"), "both:patient_id=3");

    // Behind a view that reads as its owner, nobody knows whether the policy applied.
    view(&mut known, "owned", &["id"], "select mine.id from public.mine", false);
    assert_eq!(found(&known, "select * from owned"), "mine");
    view(&mut known, "invoked", &["id"], "select mine.id from public.mine", true);
    assert_eq!(found(&known, "select * from invoked"), "mine:patient_id=3");
}

#[test]
fn policies_that_read_each_other_end() {
    let mut known = clinic();
    let columns = [("id", "int8", true)];
    table(&mut known, "p", &columns, vec![policy(true, "exists (select 1 from q where q.id = p.id)")]);
    table(&mut known, "q", &columns, vec![policy(true, "exists (select 1 from p where p.id = q.id)")]);
    assert!(found(&known, "select * from p").starts_with("given up: "));
}

#[test]
fn what_is_not_understood_narrows_nothing() {
    for sql in ["select * from unknown where id = 1", "select * from a join unknown using (id) where id = 1"] {
        assert!(found(&clinic(), sql).starts_with("given up: "), "{sql}");
    }
    let many: Vec<String> = (1..20).map(|n| format!("x{n} as (select p.id from x{} p, x{} q)", n - 1, n - 1)).collect();
    let sql = format!("with x0 as (select id from a), {} select * from x19 where id = 1", many.join(", "));
    assert!(found(&clinic(), &sql).starts_with("given up: "));
}
