//! P3: what is decided in memory, asked for many at once, asked for one, or answered from what was said before, is what PostgreSQL's
//! own row security shows, for generated policies, claims and rows.
//!
//! Prints how many decisions were compared and how many went which way. `WALCAST_SEED` repeats a run.

#[path = "policy/generated.rs"]
mod generated;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use generated::{Random, USERS};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use walcast_auth::{
    Publications, Question, RowRule, Rules,
    policy::{Answer, BoundPolicy, Policy, Values},
    row_visibility::{Asking, AskingSet, ask, ask_set},
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
insert into members values ('a', '00000000-0000-4000-8000-00000000000a'), ('b', '00000000-0000-4000-8000-00000000000a'),
  ('b', '00000000-0000-4000-8000-00000000000b'), (null, '00000000-0000-4000-8000-00000000000b'), ('A', null);
create table teams (tenant text, who uuid, open boolean);
insert into teams select tenant, who, tenant = 'a' from members union all select 'c', 'f0000000-0000-4000-8000-00000000000c', false;
alter table teams enable row level security;
create policy own on teams for select to authenticated using (who = (select auth.uid()) or open);
grant select on t, members, teams to authenticated;
create function who() returns uuid language sql stable as $$ select m.who from members m limit 1 $$;
create publication walcast for table t, members, teams;
create publication supabase_realtime for table t;"#;

const COLUMNS: [&str; 11] = ["id", "owner", "tenant", "code", "n", "s", "flag", "label", "Odd name", "fixed", "day"];

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

    let timeout = Duration::from_secs(5);
    let mut memory = Way::new("in memory");
    let (mut set, mut one, mut again) = (Way::new("for many at once"), Way::new("for one"), Way::new("remembered"));
    let mut undecided = 0_u64;
    for number in 0..POLICIES {
        let policies = random.policies();
        sql.batch_execute(&policies).await.unwrap_or_else(|error| panic!("{policies}: {error:?}"));
        let callers: Vec<Claims> = (0..CALLERS).map(|_| random.claims()).collect();
        let rules = Rules::load(&pool, TableId(oid), &callers[0], publications).await.unwrap().unwrap();
        let question = match &rules.rows {
            RowRule::Ask(question) => Some(&**question),
            RowRule::Nobody => None,
            RowRule::All => panic!("row security is on"),
        };
        let mut world = World { policies: &policies, callers: &callers, rows: &rows, truth: Vec::new() };
        for claims in &callers {
            world.truth.push(seen_by(&pool, claims).await);
        }
        let Some(question) = question else {
            assert!(world.truth.iter().flatten().all(BTreeSet::is_empty), "{policies}");
            continue;
        };
        if let Some(policy) = &question.policy {
            memory.policies += 1;
            let bound = policy.binder.bound(&pool, &callers, timeout).await.unwrap();
            let bound: Vec<Option<BoundPolicy>> = bound.into_iter().map(|values| Some(policy.with(values?))).collect();
            for (caller, of_caller) in bound.iter().enumerate() {
                for (at, (_, row)) in rows.iter().enumerate() {
                    match of_caller.as_ref().map(|bound| bound.decide(&table, row)) {
                        None | Some(Answer::Ask) => undecided += 1,
                        Some(answer) => world.check(&mut memory, caller, at, answer == Answer::Allow),
                    }
                    // Control: what was bound for the caller before this one.
                    let before = caller.checked_sub(1).and_then(|before| bound[before].as_ref());
                    memory.control(world.hidden(caller, at) && before.is_some_and(|b| b.decide(&table, row) == Answer::Allow));
                }
            }
        }

        let mut answers: Vec<(usize, usize, bool)> = Vec::new();
        let mut who: Vec<Option<Who>> = callers.iter().map(|claims| Some(Who::Exact(claims.exact()))).collect();
        if let Some(form) = &question.set {
            set.policies += 1;
            let bound = form.binder.bound(&pool, &callers, timeout).await.unwrap();
            who = bound.iter().map(|values| values.clone().map(Who::Values)).collect();
            let places: Vec<usize> = (0..CALLERS).filter(|caller| bound[*caller].is_some()).collect();
            let asking = AskingSet {
                role_of: &callers[0],
                callers: places.iter().map(|at| (bound[*at].clone().unwrap(), rand::random())).collect(),
                images: rows.iter().map(|(_, row)| (&table, row)).collect(),
                pairs: (0..places.len()).flat_map(|caller| (0..ROWS).map(move |row| (caller, row))).collect(),
            };
            match ask_set(&pool, &rules, question, form, &asking, timeout).await {
                Ok(verdicts) => answers.extend(
                    asking.pairs.iter().zip(&verdicts.allowed).map(|((caller, row), allowed)| (places[*caller], *row, *allowed)),
                ),
                // A number out of range, for one: a query fails as well, and each is asked by himself.
                Err(error) => {
                    let of_data = error.sqlstate().is_some_and(|code| code.starts_with("22"));
                    let fails = of_data && world.truth.iter().any(Result::is_err);
                    assert!(fails, "{policies}\n{}\n{error:?}", form.condition);
                }
            }
            answers.iter().for_each(|(caller, row, allowed)| world.check(&mut set, *caller, *row, *allowed));
            // Control: the answers of one caller for those of the next.
            let mistaken = answers.iter().zip(answers.iter().skip(ROWS));
            mistaken.for_each(|((.., allowed), (caller, row, _))| set.control(*allowed && world.hidden(*caller, *row)));
        }
        one.policies += 1;
        // Each by himself: who has no other way, and some of the others.
        for (caller, claims) in callers.iter().enumerate() {
            let other_way = question.set.is_some() && who[caller].is_some();
            if other_way && (caller + number) % 4 != 0 {
                continue;
            }
            let images = rows.iter().map(|(_, row)| (&table, row)).collect();
            let Ok(verdicts) = ask(&pool, &rules, question, &Asking { claims, images, nonce: rand::random() }, timeout).await
            else {
                assert!(world.truth[caller].is_err(), "{policies}\n{}", claims.json());
                continue;
            };
            for (row, allowed) in verdicts.allowed.into_iter().enumerate() {
                world.check(&mut one, caller, row, allowed);
                if !other_way {
                    answers.push((caller, row, allowed));
                }
            }
        }
        if question.rememberable {
            again.policies += 1;
            // The first answer for each that is the same to the policy, held against what all of them see.
            let cells = |row: usize| -> Vec<Cell> {
                question.needs.iter().map(|name| rows[row].1.cell(table.column(name).unwrap().0).clone()).collect()
            };
            let mut first: HashMap<(Option<Who>, String), bool> = HashMap::new();
            let mut careless: HashMap<Option<Who>, bool> = HashMap::new();
            for (caller, row, allowed) in answers {
                let key = (who[caller].clone().or(Some(Who::Exact(callers[caller].exact()))), format!("{:?}", cells(row)));
                match first.get(&key) {
                    Some(said) => world.check(&mut again, caller, row, *said),
                    None => {
                        first.insert(key, allowed);
                    }
                }
                // Control: whatever row it was.
                let said = *careless.entry(who[caller].clone()).or_insert(allowed);
                again.control(said && world.hidden(caller, row));
            }
        }
        sql.batch_execute(
            "do $$ declare p record; begin for p in select polname from pg_policy where polrelid = 't'::regclass \
             loop execute format('drop policy %I on t', p.polname); end loop; end $$",
        )
        .await
        .unwrap();
    }
    let all = (POLICIES * CALLERS * ROWS) as u64;
    println!("{all} decisions on {POLICIES} policies; {undecided} of compiled policies were left to PostgreSQL");
    for way in [&memory, &set, &one, &again] {
        println!("{way}, {:.1} % of what there is to decide", way.compared as f64 * 100.0 / all as f64);
        assert!(way.compared > 5_000 && way.shown > way.compared / 50, "these policies try too little: {way}");
        assert!(way.caught > 0 || way.name == "for one", "control: {way}, and nothing told");
    }
    let compared: u64 = [&memory, &set, &one, &again].iter().map(|way| way.compared).sum();
    assert!(compared >= 200_000 && memory.compared > all / 3, "these policies try too little");
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Who {
    Values(Arc<Values>),
    Exact(u128),
}

/// How it went with one way to decide.
struct Way {
    name: &'static str,
    policies: usize,
    compared: u64,
    shown: u64,
    /// What the control said that must not be said.
    caught: u64,
}

impl Way {
    fn new(name: &'static str) -> Way {
        Way { name, policies: 0, compared: 0, shown: 0, caught: 0 }
    }

    fn control(&mut self, leaks: bool) {
        self.caught += u64::from(leaks);
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Way { name, policies, compared, shown, caught } = self;
        write!(f, "{name}: {compared} decisions of {policies} policies, {shown} rows shown, {caught} leaks of the control")
    }
}

/// One set of policies, and what PostgreSQL shows under them.
struct World<'a> {
    policies: &'a str,
    callers: &'a [Claims],
    rows: &'a [(i64, Row)],
    truth: Vec<Result<BTreeSet<i64>, String>>,
}

impl World<'_> {
    fn check(&self, way: &mut Way, caller: usize, row: usize, allowed: bool) {
        let (id, row) = &self.rows[row];
        match &self.truth[caller] {
            Ok(seen) => assert_eq!(
                allowed,
                seen.contains(id),
                "{}\n{}\nrow {id}: {row:?}\nleft: {}, right: PostgreSQL",
                self.policies,
                self.callers[caller].json(),
                way.name
            ),
            // PostgreSQL may meet an error on another row's way: it shows nobody anything then.
            Err(error) => {
                assert!(!allowed || way.name != "in memory", "{}\n{}\n{error}", self.policies, self.callers[caller].json())
            }
        }
        way.compared += 1;
        way.shown += u64::from(allowed);
    }

    fn hidden(&self, caller: usize, row: usize) -> bool {
        self.truth[caller].as_ref().is_ok_and(|seen| !seen.contains(&self.rows[row].0))
    }
}

/// A world with one policy on `t`, and what became of it.
async fn question(using: &str) -> (TestPostgres, Pool, Question) {
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
    (postgres, pool, *question)
}

fn issued_at(iat: u64) -> Claims {
    let Value::Object(map) = json!({ "role": "authenticated", "exp": 4_000_000_000_u64, "iat": iat, "sub": USERS[0] }) else {
        unreachable!()
    };
    Claims::verified(map).unwrap()
}

#[tokio::test]
async fn p3_what_one_token_may_see_is_not_remembered_for_another_of_the_same_user() {
    let (_postgres, pool, question) = question("n <= (auth.jwt() ->> 'iat')::int").await;
    let policy: Arc<Policy> = question.policy.expect("it is of the row and the claims");
    let mut cells = vec![Cell::Null; COLUMNS.len()];
    cells[4] = Cell::Value("100".into());
    let (table, row) = (table(), Row(cells));
    for (iat, expected) in [(200, Answer::Allow), (50, Answer::Deny), (200, Answer::Allow)] {
        let bound = policy.binder.bound(&pool, &[issued_at(iat)], Duration::from_secs(5)).await.unwrap();
        assert_eq!(policy.with(bound[0].clone().unwrap()).decide(&table, &row), expected, "iat {iat}");
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
        let (_postgres, _pool, question) = question(using).await;
        assert!(question.policy.is_none(), "{using}");
    }
}

#[tokio::test]
async fn p3_what_may_change_by_itself_or_cannot_be_looked_into_is_never_remembered() {
    let (postgres, pool, remembered) = question("tenant in (select m.tenant from members m where m.who = auth.uid())").await;
    assert!(remembered.rememberable && remembered.set.is_some());
    let sql = "create function alike(text, text) returns boolean language sql stable as 'select exists (select from members)'; \
               create operator === (leftarg = text, rightarg = text, function = alike); \
               create domain checked as text check (alike(value, value))";
    postgres.execute(sql).await.unwrap();
    for (using, set) in [
        ("exists (select 1 from teams g where g.tenant = t.tenant)", false),
        ("owner = who()", false),
        ("day < now()", true),
        ("day::text < current_date::text", true),
        ("random() < n", false),
        ("tenant === 'a'", false),
        ("tenant::checked is not null", false),
        ("tenant = current_setting('walcast.anything', true)", false),
        ("exists (select 1 from t other where other.id = t.n)", false),
    ] {
        postgres.execute(&format!("alter policy p on t using ({using})")).await.unwrap();
        let again = Rules::load(&pool, oid_of(&postgres).await, &issued_at(1), PUBLICATIONS).await.unwrap().unwrap();
        let RowRule::Ask(question) = again.rows else { panic!("row security is on") };
        // The policies of teams read nothing but claims and rows: each caller's own answer may be remembered.
        assert_eq!(question.rememberable, using.contains("teams"), "{using}");
        assert_eq!(question.set.is_some(), set, "{using}");
    }
    postgres.execute("alter policy own on teams using (who = auth.uid() and now() > '2000-01-01')").await.unwrap();
    postgres.execute("alter policy p on t using (exists (select 1 from teams g where g.tenant = t.tenant))").await.unwrap();
    let again = Rules::load(&pool, oid_of(&postgres).await, &issued_at(1), PUBLICATIONS).await.unwrap().unwrap();
    let RowRule::Ask(question) = again.rows else { panic!("row security is on") };
    assert!(!question.rememberable, "what the policy reads is itself a matter of time");
}

#[tokio::test]
async fn a_herd_of_tokens_is_asked_for_in_a_few_statements_and_one_that_is_refused_spoils_nobodys_answer() {
    let (postgres, pool, question) = question("owner = auth.uid() and n <= (auth.jwt() ->> 'iat')::int").await;
    let policy = question.policy.expect("it is of the row and the claims");
    let mut herd: Vec<Claims> = (0..3_000).map(issued_at).collect();
    let Value::Object(map) = json!({ "role": "authenticated", "exp": 4_000_000_000_u64, "iat": "soon", "sub": USERS[0] }) else {
        unreachable!()
    };
    herd.insert(700, Claims::verified(map).unwrap());
    let timeout = Duration::from_secs(5);
    let coming = herd.iter().map(|claims| policy.binder.prepare(&pool, claims, timeout));
    futures_util::future::try_join_all(coming).await.unwrap();
    let known: Vec<_> = herd.iter().map(|claims| policy.binder.known(claims).expect("it was asked for")).collect();
    for (at, bound) in known.iter().enumerate() {
        let iat = bound.as_ref().map(|values| values.0[1].values.clone());
        let expected = if at > 700 { at - 1 } else { at };
        assert_eq!(iat, (at != 700).then(|| Some(vec![Some(expected.to_string())])), "token {at}");
    }
    // Who comes again costs nothing: without a database, too.
    pool.close();
    futures_util::future::try_join_all(herd.iter().map(|claims| policy.binder.prepare(&pool, claims, timeout))).await.unwrap();
    let spent = transactions(&postgres).await;
    assert!(spent < 60, "{spent} transactions for 3,001 tokens");
}

/// Rolled back ones: our questions are. Sessions report as they end, which they do with the pool.
async fn transactions(postgres: &TestPostgres) -> i64 {
    let sql = postgres.connect().await.unwrap();
    loop {
        let row = sql
            .query_one(
                "select (select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() \
                   and backend_type = 'client backend' and state = 'idle' and query = 'rollback'), \
                 (select xact_rollback from pg_stat_database where datname = current_database())",
                &[],
            )
            .await
            .unwrap();
        if row.get::<_, i64>(0) == 0 {
            return row.get(1);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const PUBLICATIONS: Publications<'_> = Publications { realtime: "supabase_realtime", cache: "walcast" };

async fn oid_of(postgres: &TestPostgres) -> TableId {
    let sql = postgres.connect().await.unwrap();
    TableId(sql.query_one("select 't'::regclass::oid", &[]).await.unwrap().get(0))
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
