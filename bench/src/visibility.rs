//! What it costs to tell who may see a row: binding claims, deciding in memory, asking for many callers at once and for each.
//!
//! In this process, against a throw-away PostgreSQL; the stream and the sockets have no part in it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde_json::json;
use walcast_auth::{
    Publications, Question, RowRule, Rules,
    policy::Values,
    row_visibility::{Asking, AskingSet, ask_each, ask_set},
};
use walcast_model::{Cell, Claims, Column, ReplicaIdentity, Row, Table, TableId, TableName, ValueKind};
use walcast_pg::{ConnectConfig, Pool};
use walcast_testkit::TestPostgres;

use crate::figures::{Figures, table};

const CALLERS: usize = 10_000;
const TEAMS: usize = 1_000;
const TIMEOUT: Duration = Duration::from_secs(30);

const SCHEMA: &str = "
create table members (team int, who uuid, primary key (who, team));
insert into members select n % 1000, md5('u' || n)::uuid from generate_series(0, 9999) n;
insert into members select (n + 1) % 1000, md5('u' || n)::uuid from generate_series(0, 9999) n;
analyze members;
create table mine (id bigint primary key, team int, owner uuid, body text);
create table teams (like mine including all);
alter table mine enable row level security;
alter table teams enable row level security;
create policy p on mine for select to authenticated using (owner = auth.uid() and body is not null);
create policy p on teams for select to authenticated
  using (exists (select 1 from members m where m.team = teams.team and m.who = (select auth.uid())));
grant select on mine, teams, members to authenticated;
create publication walcast for table mine, teams, members;
create publication supabase_realtime for table mine, teams;";

pub async fn run(rounds: u32) -> anyhow::Result<()> {
    let postgres = TestPostgres::start().await?;
    for (_, sql) in walcast_auth::MIGRATIONS {
        postgres.execute(sql).await?;
    }
    postgres.execute(SCHEMA).await?;
    let pool = Pool::new(&ConnectConfig::parse(&postgres.url())?, 2, TIMEOUT)?;
    let sql = postgres.connect().await?;
    let ids = sql.query("select md5('u' || n)::uuid::text from generate_series(0, $1::int8 - 1) n", &[&(CALLERS as i64)]).await?;
    let callers: Vec<Claims> = ids.iter().map(|row| claims(row.get(0))).collect::<Result<_, _>>()?;
    let rows: Vec<Row> = (0..100).map(|at| image(at, ids[at * 7].get(0))).collect();
    let (mut bind, mut memory, mut set, mut each) =
        (Figures::default(), Figures::default(), Figures::default(), Figures::default());
    for _ in 0..rounds {
        let (mine, rules) = rules_of(&pool, &sql, "mine", &callers[0]).await?;
        let policy = question(&rules)?.policy.clone().context("decided in memory")?;
        let began = Instant::now();
        let bound = policy.binder.bound(&pool, &callers, TIMEOUT).await?;
        bind.add(began.elapsed().as_secs_f64() * 1e6 / CALLERS as f64);
        let bound: Vec<_> = bound.into_iter().flatten().map(|values| policy.with(values)).collect();
        let began = Instant::now();
        let shown = rows
            .iter()
            .flat_map(|row| bound.iter().map(|bound| bound.decide(&mine, row)))
            .filter(|answer| matches!(answer, walcast_auth::policy::Answer::Allow));
        let shown = shown.count();
        memory.add(began.elapsed().as_secs_f64() * 1e6 / (CALLERS * rows.len()) as f64);
        if shown != rows.len() {
            bail!("{shown} rows shown, each has one owner");
        }

        let (teams, rules) = rules_of(&pool, &sql, "teams", &callers[0]).await?;
        let question = question(&rules)?;
        let form = question.set.clone().context("asked for many at once")?;
        let values: Vec<Arc<Values>> = form.binder.bound(&pool, &callers, TIMEOUT).await?.into_iter().flatten().collect();
        let asking = AskingSet {
            role_of: &callers[0],
            callers: values.into_iter().zip(0..).collect(),
            images: rows[..10].iter().map(|row| (&teams, row)).collect(),
            pairs: (0..CALLERS).flat_map(|caller| (0..10).map(move |row| (caller, row))).collect(),
        };
        let began = Instant::now();
        let verdicts = ask_set(&pool, &rules, question, &form, &asking, TIMEOUT).await?;
        set.add(began.elapsed().as_secs_f64() * 1e6 / asking.pairs.len() as f64);
        let allowed = verdicts.allowed.iter().filter(|allowed| **allowed).count();
        if allowed != 10 * 2 * CALLERS / TEAMS {
            bail!("{allowed} allowed, each team has 20 members");
        }
        let images: Vec<_> = rows[..10].iter().map(|row| (&teams, row)).collect();
        let one_by_one =
            callers.iter().take(1_000).zip(0..).map(|(claims, nonce)| Asking { claims, images: images.clone(), nonce });
        let one_by_one: Vec<Asking<'_>> = one_by_one.collect();
        let began = Instant::now();
        for some in one_by_one.chunks(200) {
            ask_each(&pool, &rules, question, some, TIMEOUT).await?;
        }
        each.add(began.elapsed().as_secs_f64() * 1e6 / 10_000.0);
    }
    let line = |what: &str, figures: &Figures| vec![what.to_owned(), figures.show(2), format!("{:.0}", 1e6 / figures.median())];
    table(
        "Who may see a row",
        &["", "µs each", "a second"],
        &[
            line("claims bound, 10,000 tokens", &bind),
            line("decided in memory", &memory),
            line("asked for 10,000 callers at once, 10 rows", &set),
            line("asked for each caller, 10 rows", &each),
        ],
    );
    Ok(())
}

fn claims(subject: &str) -> anyhow::Result<Claims> {
    let claims = json!({ "role": "authenticated", "exp": 4_000_000_000_u64, "sub": subject });
    Ok(Claims::verified(claims.as_object().cloned().unwrap_or_default())?)
}

fn image(at: usize, owner: &str) -> Row {
    let cell = |text: String| Cell::Value(text.into());
    Row(vec![cell(at.to_string()), cell((at % TEAMS).to_string()), cell(owner.to_owned()), cell("a note".to_owned())])
}

fn question(rules: &Rules) -> anyhow::Result<&Question> {
    match &rules.rows {
        RowRule::Ask(question) => Ok(question),
        _ => bail!("row security is on"),
    }
}

async fn rules_of(pool: &Pool, sql: &tokio_postgres::Client, name: &str, claims: &Claims) -> anyhow::Result<(Table, Rules)> {
    let oid: u32 = sql.query_one("select ($1::text)::regclass::oid", &[&name]).await?.get(0);
    let publications = Publications { realtime: "supabase_realtime", cache: "walcast" };
    let rules = Rules::load(pool, TableId(oid), claims, publications).await?.context("the table is there")?;
    let column = |column: &walcast_auth::ColumnRule| Column {
        name: column.name.as_str().into(),
        type_oid: column.type_oid,
        type_name: "".into(),
        kind: ValueKind::Text,
        key: column.primary,
        tagged: false,
    };
    let columns = rules.columns.iter().map(column).collect();
    Ok((Table { id: TableId(oid), name: TableName::new("public", name), identity: ReplicaIdentity::Default, columns }, rules))
}
