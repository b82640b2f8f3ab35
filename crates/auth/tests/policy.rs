//! P3: what is decided in memory is what PostgreSQL's own row security shows, for generated policies, claims and rows.
//!
//! Prints how many decisions were compared and what share of them needed no question. `WALCAST_SEED` repeats a run.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use walcast_auth::{
    Publications, RowRule, Rules,
    policy::{Answer, Bound, Policy},
};
use walcast_model::{Cell, Claims, Column, ReplicaIdentity, Row, Table, TableId, TableName, ValueKind};
use walcast_pg::{ConnectConfig, Envelope, Pool};
use walcast_testkit::TestPostgres;

const POLICIES: usize = 110;
const CALLERS: usize = 40;
const ROWS: usize = 60;

const SCHEMA: &str = r#"
create table t (id bigint primary key, owner uuid, tenant text, code varchar(10), n int, s smallint, flag boolean,
  label text collate "C", "Odd name" text, fixed char(4), day date);
alter table t enable row level security;
create table members (tenant text, who uuid);
grant select on t, members to authenticated;
create function who() returns uuid language sql stable as $$ select m.who from members m limit 1 $$;
create publication walcast for table t, members;
create publication supabase_realtime for table t;"#;

const COLUMNS: [&str; 11] = ["id", "owner", "tenant", "code", "n", "s", "flag", "label", "Odd name", "fixed", "day"];

const USERS: [&str; 4] = [
    "00000000-0000-4000-8000-00000000000a",
    "00000000-0000-4000-8000-00000000000b",
    "f0000000-0000-4000-8000-00000000000c",
    "00000000-0000-4000-8000-0000000000ff",
];

const EQUALITY: [&str; 4] = ["=", "<>", "is distinct from", "is not distinct from"];
const ORDER: [&str; 6] = ["=", "<>", "<", "<=", ">", ">="];
const TEXTS: [&str; 8] = [
    "auth.jwt() ->> 'tenant'",
    "(select auth.jwt() ->> 'tenant')",
    "auth.jwt() -> 'app_metadata' ->> 'tenant'",
    "current_setting('request.jwt.claims', true)::json ->> 'tenant'",
    "lower(auth.jwt() ->> 'tenant')",
    "'a'",
    "nullif('', '')",
    "auth.role()",
];
const FLAGS: [&str; 8] =
    ["flag", "not flag", "flag is true", "flag is not true", "flag is false", "flag is null", "flag = false", "flag is unknown"];
/// What PostgreSQL is asked for.
const BEYOND: [&str; 11] = [
    "owner = who()",
    "exists (select 1 from members m where m.tenant = t.tenant and m.who = auth.uid())",
    "day < now()",
    "fixed = 'a'",
    "tenant like 'a%'",
    "tenant < 'b'",
    "length(tenant) > 0",
    "tenant = current_user",
    "owner::text = upper(tenant)",
    "n + 1 = 2",
    "day = '2026-01-01'",
];

struct Random(StdRng);

impl Random {
    fn of<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list.choose(&mut self.0).unwrap()
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.0.random_range(0..n) == 0
    }

    /// A condition that people write, or might.
    fn condition(&mut self, depth: u32) -> String {
        match self.0.random_range(0..if depth > 0 { 26 } else { 20 }) {
            0 | 1 => format!("owner {} auth.uid()", self.of(&EQUALITY)),
            2 => format!("(select auth.uid()) {} owner", self.of(&EQUALITY)),
            3 => format!("tenant {} ({})", self.of(&EQUALITY), self.of(&TEXTS)),
            4 => format!("code {} ({})", self.of(&EQUALITY), self.of(&TEXTS)),
            5 => format!("label {} ({})", self.of(&ORDER), self.of(&TEXTS)),
            6 => format!(
                "n {} {}",
                self.of(&ORDER),
                self.of(&["1", "-3", "2147483647", "3000000000", "(auth.jwt() ->> 'n')::int"])
            ),
            7 => format!("s {} {}", self.of(&ORDER), self.of(&["n", "2", "(auth.jwt() ->> 'n')::bigint"])),
            8 => self.of(&FLAGS).to_owned(),
            9 => format!("{} is {}null", self.of(&["owner", "tenant", "n", "day", "\"Odd name\""]), self.of(&["", "not "])),
            10 => {
                format!(
                    "tenant {}in ('a', 'b', {})",
                    self.of(&["", "not "]),
                    self.of(&["'c'", "null", "auth.jwt() ->> 'tenant'"])
                )
            }
            11 => format!("n {}in (1, 2, null)", self.of(&["", "not "])),
            12 => "tenant = any (string_to_array(auth.jwt() ->> 'tenants', ','))".to_owned(),
            13 => format!("owner::text {} (auth.jwt() ->> 'sub')", self.of(&EQUALITY)),
            14 => "((auth.jwt() ->> 'admin')::boolean)".to_owned(),
            15 => format!("\"Odd name\" {} 'x'", self.of(&EQUALITY)),
            16 => format!("auth.role() = {}", self.of(&["'authenticated'", "'anon'"])),
            17 => self.of(&["true", "false", "null::boolean"]).to_owned(),
            18 => format!("n::text = {}", self.of(&["'1'", "(auth.jwt() ->> 'n')"])),
            19 => self.of(&BEYOND).to_owned(),
            20 | 21 => format!("({} and {})", self.condition(depth - 1), self.condition(depth - 1)),
            22 | 23 => format!("({} or {})", self.condition(depth - 1), self.condition(depth - 1)),
            _ => format!("not ({})", self.condition(depth - 1)),
        }
    }

    fn policies(&mut self) -> String {
        let mut sql = String::new();
        for n in 0..self.0.random_range(1..3) {
            let (command, role) = (self.of(&["select", "all"]), self.of(&["authenticated", "public"]));
            sql.push_str(&format!("create policy p{n} on t for {command} to {role} using ({});", self.condition(2)));
        }
        if self.one_in(3) {
            sql.push_str(&format!(
                "create policy r on t as restrictive for select to authenticated using ({});",
                self.condition(1)
            ));
        }
        sql
    }

    fn any(&mut self, list: &[Value]) -> Value {
        list.choose(&mut self.0).unwrap().clone()
    }

    fn claims(&mut self) -> Claims {
        let mut map = json!({ "role": "authenticated", "exp": 4_000_000_000_u64 });
        if !self.one_in(6) {
            map["sub"] = json!(self.of(&USERS));
        }
        if !self.one_in(4) {
            map["tenant"] = self.any(&[json!("a"), json!("A"), json!("b"), json!(7), json!(null), json!("")]);
        }
        if self.one_in(2) {
            map["app_metadata"] = json!({ "tenant": self.of(&["a", "b", "c"]) });
        }
        if self.one_in(2) {
            map["n"] = self.any(&[json!(1), json!("2"), json!(-3), json!("x"), json!(null)]);
        }
        if self.one_in(2) {
            map["tenants"] = json!(self.of(&["a,b", "", "c", "A,,b"]));
        }
        if self.one_in(2) {
            map["admin"] = self.any(&[json!(true), json!("yes"), json!("f"), json!(null)]);
        }
        let Value::Object(map) = map else { unreachable!() };
        Claims::verified(map).unwrap()
    }

    fn row(&mut self, id: usize) -> String {
        const WORDS: [&str; 7] = ["a", "b", "A", "c", "", "7", "authenticated"];
        let columns: [&[&str]; 10] = [
            &USERS,
            &WORDS,
            &WORDS[..6],
            &["1", "2", "-3", "0", "2147483647"],
            &["1", "2", "-3"],
            &["true", "false"],
            &WORDS,
            &["x", "y"],
            &["a", "ab"],
            &["2026-01-01", "infinity"],
        ];
        let values = columns.map(|list| if self.one_in(5) { "null".to_owned() } else { format!("'{}'", self.of(list)) });
        format!("({id}, {})", values.join(", "))
    }
}

/// As the stream would describe it.
fn table() -> Table {
    let column = |name: &&str| Column {
        name: (*name).into(),
        type_oid: 0,
        type_name: "".into(),
        kind: ValueKind::Text,
        key: *name == "id",
        tagged: false,
    };
    Table {
        id: TableId(0),
        name: TableName::new("public", "t"),
        identity: ReplicaIdentity::Full,
        columns: COLUMNS.iter().map(column).collect(),
    }
}

#[tokio::test]
async fn p3_what_is_decided_in_memory_is_what_row_security_shows() {
    let seed = std::env::var("WALCAST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| rand::rng().random());
    println!("WALCAST_SEED={seed}");
    let mut random = Random(StdRng::seed_from_u64(seed));
    let postgres = TestPostgres::start().await.unwrap();
    for (_, sql) in walcast_auth::MIGRATIONS {
        postgres.execute(sql).await.unwrap();
    }
    postgres.execute(SCHEMA).await.unwrap();
    let values: Vec<String> = (0..ROWS).map(|id| random.row(id)).collect();
    postgres.execute(&format!("insert into t values {}", values.join(","))).await.unwrap();
    let sql = postgres.connect().await.unwrap();
    let rows = images(&sql).await;
    let oid: u32 = sql.query_one("select 't'::regclass::oid", &[]).await.unwrap().get(0);
    let pool = Pool::new(&ConnectConfig::parse(&postgres.url()).unwrap(), 2, Duration::from_secs(10)).unwrap();
    let publications = Publications { realtime: "supabase_realtime", cache: "walcast" };
    let table = table();

    let (mut compared, mut in_memory, mut shown, mut compiled, mut caught) = (0_u64, 0_u64, 0_u64, 0, 0_u64);
    for _ in 0..POLICIES {
        let policies = random.policies();
        sql.batch_execute(&policies).await.unwrap_or_else(|error| panic!("{policies}: {error:?}"));
        let callers: Vec<Claims> = (0..CALLERS).map(|_| random.claims()).collect();
        let rules = Rules::load(&pool, TableId(oid), &callers[0], publications).await.unwrap().unwrap();
        let policy = match &rules.rows {
            RowRule::Ask(question) => question.policy.as_ref(),
            RowRule::Nobody => None,
            RowRule::All => panic!("row security is on"),
        };
        compiled += u32::from(policy.is_some());
        let mut before: Option<Bound> = None;
        for claims in &callers {
            compared += ROWS as u64;
            let Some(policy) = policy else { continue };
            let Ok(bound) = policy.bind(&pool, claims, Duration::from_secs(5)).await else { continue };
            let truth = seen_by(&pool, claims).await;
            for (id, row) in &rows {
                let answer = bound.decide(&table, row);
                match (answer, truth.as_ref().map(|truth| truth.contains(id))) {
                    // PostgreSQL may meet an error on another row's way: it shows nobody anything then.
                    (Answer::Ask, _) | (Answer::Allow, Ok(true)) | (Answer::Deny, Ok(false) | Err(_)) => {}
                    (answer, seen) => panic!(
                        "{policies}\n{}\nrow {id}: {row:?}\nin memory {answer:?}, PostgreSQL {seen:?}\n{bound:?}",
                        claims.json()
                    ),
                }
                // Control: what was bound for the caller before this one.
                let mistaken = before.as_ref().map(|before| before.decide(&table, row));
                let hidden = truth.as_ref().is_ok_and(|truth| !truth.contains(id));
                caught += u64::from(mistaken == Some(Answer::Allow) && hidden);
                in_memory += u64::from(answer != Answer::Ask);
                shown += u64::from(answer == Answer::Allow);
            }
            before = Some(bound);
        }
        sql.batch_execute(
            "do $$ declare p record; begin for p in select polname from pg_policy where polrelid = 't'::regclass \
             loop execute format('drop policy %I on t', p.polname); end loop; end $$",
        )
        .await
        .unwrap();
    }
    println!(
        "{compared} decisions, {compiled} of {POLICIES} policies compiled, {:.1} % of the decisions in memory, {shown} rows shown",
        in_memory as f64 * 100.0 / compared as f64
    );
    assert!(compared >= 200_000 && in_memory > compared / 3 && shown > in_memory / 20, "these policies try too little");
    assert!(caught > 0, "control: one caller's claims stood for another's, and nothing told");
}

/// A world with one policy on `t`, and what was compiled of it.
async fn compiled(using: &str) -> (TestPostgres, Pool, Option<Arc<Policy>>) {
    let postgres = TestPostgres::start().await.unwrap();
    for (_, sql) in walcast_auth::MIGRATIONS {
        postgres.execute(sql).await.unwrap();
    }
    postgres.execute(SCHEMA).await.unwrap();
    postgres.execute("alter table t add \"CURRENT_ROLE\" text").await.unwrap();
    postgres.execute(&format!("create policy p on t for select to authenticated using ({using})")).await.unwrap();
    let sql = postgres.connect().await.unwrap();
    let oid: u32 = sql.query_one("select 't'::regclass::oid", &[]).await.unwrap().get(0);
    let pool = Pool::new(&ConnectConfig::parse(&postgres.url()).unwrap(), 2, Duration::from_secs(10)).unwrap();
    let publications = Publications { realtime: "supabase_realtime", cache: "walcast" };
    let rules = Rules::load(&pool, TableId(oid), &issued_at(1), publications).await.unwrap().unwrap();
    let RowRule::Ask(question) = rules.rows else { panic!("row security is on") };
    (postgres, pool, question.policy)
}

fn issued_at(iat: u64) -> Claims {
    let Value::Object(map) = json!({ "role": "authenticated", "exp": 4_000_000_000_u64, "iat": iat, "sub": USERS[0] }) else {
        unreachable!()
    };
    Claims::verified(map).unwrap()
}

#[tokio::test]
async fn p3_what_one_token_may_see_is_not_remembered_for_another_of_the_same_user() {
    let (_postgres, pool, policy) = compiled("n <= (auth.jwt() ->> 'iat')::int").await;
    let policy = policy.expect("it is of the row and the claims");
    let mut cells = vec![Cell::Null; COLUMNS.len()];
    cells[4] = Cell::Value("100".into());
    let (table, row) = (table(), Row(cells));
    for (iat, expected) in [(200, Answer::Allow), (50, Answer::Deny), (200, Answer::Allow)] {
        let bound = policy.bound(&pool, &issued_at(iat), Duration::from_secs(5)).await.unwrap().unwrap();
        assert_eq!(bound.decide(&table, &row), expected, "iat {iat}");
    }
}

#[tokio::test]
async fn p3_what_is_not_certain_is_left_to_postgresql() {
    for using in [
        "tenant = 'a''''b'",
        r"tenant = 'a\b'",
        "tenant = current_role",
        "tenant = current_setting('search_path')",
        "owner = who()",
    ] {
        let (_postgres, _pool, policy) = compiled(using).await;
        assert!(policy.is_none(), "{using}");
    }
}

async fn images(sql: &tokio_postgres::Client) -> Vec<(i64, Row)> {
    let text = |name: &&str| format!("case when \"{name}\" is null then null else concat(\"{name}\") end");
    let columns: Vec<String> = COLUMNS.iter().map(text).collect();
    let rows = sql.query(&format!("select id, {} from t order by id", columns.join(", ")), &[]).await.unwrap();
    let cell = |text: Option<String>| text.map_or(Cell::Null, |text| Cell::Value(text.into()));
    rows.iter().map(|row| (row.get(0), Row((1..=COLUMNS.len()).map(|at| cell(row.get(at))).collect()))).collect()
}

/// What a plain query shows this caller.
async fn seen_by(pool: &Pool, claims: &Claims) -> Result<BTreeSet<i64>, String> {
    let mut scope = Envelope::new(claims, Duration::from_secs(5)).open(pool, "looking").await.unwrap();
    let answer = scope.client().query("select id from public.t", &[]).await;
    scope.end("looking").await.unwrap();
    answer.map(|rows| rows.iter().map(|row| row.get(0)).collect()).map_err(|error| format!("{error:?}"))
}
