//! Eight applications that write without pause and survive whatever happens to PostgreSQL. They write only as much as
//! they are allowed, so that a test decides what happens while they do.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use futures_util::future::join_all;
use tokio::{sync::Semaphore, task::JoinSet};
use tokio_postgres::{Client, NoTls, Statement};
use walcast_testkit::wait;

pub const SCHEMA: &str = "create table visits (id bigint primary key, value bigint);
    create table notes (id bigint primary key, value bigint);
    alter table notes replica identity full;
    grant select on visits, notes to service_role;";
pub const TABLES: &[&str] = &["visits", "notes"];

/// Commits on their way at once, on each connection.
const PIPELINED: u64 = 25;

pub struct Writers {
    allowance: Arc<Semaphore>,
    allowed: u64,
    done: Arc<AtomicU64>,
    tasks: JoinSet<()>,
}

impl Writers {
    pub fn start(url: &str, count: u64) -> Writers {
        let (allowance, done) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for number in 0..count {
            let writer = Writer { url: url.to_owned(), number, next: 0, live: Default::default() };
            tasks.spawn(writer.run(allowance.clone(), done.clone()));
        }
        Writers { allowance, allowed: 0, done, tasks }
    }

    /// Lets them go on for about so many commits.
    pub fn allow(&mut self, commits: u64) {
        let batches = commits.div_ceil(PIPELINED);
        self.allowed += batches * PIPELINED;
        self.allowance.add_permits(batches as usize);
    }

    /// Until everything that was allowed has been committed.
    pub async fn wait_done(&self, deadline: Duration) -> Result<()> {
        let what = format!("the writers have made {} commits", self.allowed);
        wait::until(deadline, what, async || self.done.load(Ordering::Acquire) >= self.allowed).await
    }

    pub async fn end(mut self) {
        self.allowance.close();
        while self.tasks.join_next().await.is_some() {}
    }
}

struct Writer {
    url: String,
    number: u64,
    next: u64,
    /// Keys that are there as far as we know, of each table.
    live: [VecDeque<i64>; 2],
}

struct Session {
    client: Client,
    /// Of each table: insert, update, delete, insert three rows.
    statements: [[Statement; 4]; 2],
}

impl Writer {
    async fn run(mut self, allowance: Arc<Semaphore>, done: Arc<AtomicU64>) {
        let mut session = None;
        while let Ok(permit) = allowance.acquire().await {
            permit.forget();
            let mut rest = PIPELINED;
            while rest > 0 {
                let Some(open) = &session else {
                    session = self.connect().await.ok();
                    if session.is_none() {
                        // PostgreSQL is away; it does not say when it will be back.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    continue;
                };
                let committed = self.batch(open, rest).await;
                done.fetch_add(committed, Ordering::AcqRel);
                rest -= committed;
                if rest > 0 {
                    // Nobody knows which of the others were committed: go on with new keys.
                    self.live = Default::default();
                    session = None;
                }
            }
        }
    }

    async fn connect(&self) -> Result<Session> {
        let (client, connection) = tokio_postgres::connect(&self.url, NoTls).await?;
        tokio::spawn(connection);
        // One of them writes commits that a crash may lose.
        let commit = if self.number == 0 { "off" } else { "on" };
        client.batch_execute(&format!("set synchronous_commit = {commit}")).await?;
        let mut statements = Vec::new();
        for table in TABLES {
            statements.push([
                client.prepare(&format!("insert into {table} values ($1, $2)")).await?,
                client.prepare(&format!("update {table} set value = $2 where id = $1")).await?,
                client.prepare(&format!("delete from {table} where id = $1 and $2::bigint is not null")).await?,
                client.prepare(&format!("insert into {table} select $1 + n, $2 from generate_series(0, 2) n")).await?,
            ]);
        }
        let statements = statements.try_into().map_err(|_| anyhow::anyhow!("there are two tables"))?;
        Ok(Session { client, statements })
    }

    /// Statements in one go, each a commit of its own. Says how many are known to be committed.
    async fn batch(&mut self, session: &Session, count: u64) -> u64 {
        let steps: Vec<(&Statement, i64, i64)> = (0..count).map(|_| self.step(session)).collect();
        let run = steps
            .iter()
            .map(|(statement, key, value)| async move { session.client.execute(*statement, &[key, value]).await.is_ok() });
        join_all(run).await.into_iter().filter(|committed| *committed).count() as u64
    }

    /// Of ten: four rows come, three change, two go, and three more come in one commit.
    fn step<'a>(&mut self, session: &'a Session) -> (&'a Statement, i64, i64) {
        self.next += 4;
        let number = self.next;
        let fresh = ((self.number << 40) | number) as i64;
        let turn = (number / 4) % 10;
        let table = (number / 40 % 2) as usize;
        let live = &mut self.live[table];
        let (kind, key) = match turn {
            0..=3 => (0, None),
            4..=6 => (1, live.get(number as usize % live.len().max(1)).copied()),
            7..=8 => (2, live.pop_front()),
            _ => (3, None),
        };
        let kind = if key.is_none() && matches!(kind, 1 | 2) { 0 } else { kind };
        if kind == 0 || kind == 3 {
            live.push_back(fresh);
        }
        (&session.statements[table][kind], key.unwrap_or(fresh), number as i64)
    }
}
