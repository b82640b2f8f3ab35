//! The herd test: a server under 5,000 stock clients is killed and started again. They all come at once, without jitter,
//! as stock clients do; they are all back in time, and PostgreSQL hardly notices: what is asked of it does not grow with
//! their number.
//!
//! `WALCAST_HERD_CLIENTS` (5,000) makes the herd larger.

mod support;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use support::{SERVE_ROLE, Server, migrate};
use tokio::task::JoinHandle;
use walcast_testkit::{RealtimeSocket, TestPostgres, Vsn, wait};

/// Two kinds of table: open to all, and one's own rows by a policy.
const SCHEMA: &str = "
create table notices (id bigint primary key, text text);
create table letters (id bigint primary key, owner uuid not null, text text);
alter table letters enable row level security;
create policy mine on letters for select to authenticated using (owner = auth.uid());
grant select on notices, letters to authenticated;";
/// The set time: so long after the server answers again everybody is back. Stock clients try every 10 s at last.
const BACK_WITHIN: Duration = Duration::from_secs(120);
/// Only catches hangs.
const DEADLINE: Duration = Duration::from_secs(300);
/// Between the tries of realtime-js; the last one stays.
const TRIES: [u64; 4] = [1, 2, 5, 10];
const HEARTBEAT: Duration = Duration::from_secs(25);
/// Joining two topics once more may cost this many statements on average: a query for each would be twenty times that.
const STATEMENTS_EACH: f64 = 0.1;

#[derive(Default)]
struct Herd {
    /// Joined, both topics.
    back: AtomicUsize,
    heard_notice: AtomicUsize,
    heard_letter: AtomicUsize,
}

struct Animal {
    herd: Arc<Herd>,
    url: String,
    token: String,
    user: String,
}

impl Animal {
    async fn run(self) {
        let mut tries = 0;
        loop {
            if let Ok(mut socket) = self.join().await {
                self.herd.back.fetch_add(1, Ordering::SeqCst);
                tries = 0;
                self.listen(&mut socket).await;
                self.herd.back.fetch_sub(1, Ordering::SeqCst);
            }
            let pause = TRIES[TRIES.len().min(tries + 1) - 1];
            tokio::time::sleep(Duration::from_secs(pause)).await;
            tries += 1;
        }
    }

    async fn join(&self) -> Result<RealtimeSocket> {
        let mut socket = RealtimeSocket::connect(&self.url, &self.token, Vsn::V2).await?;
        for (topic, table, filter) in
            [("notices", "notices", None), ("letters", "letters", Some(format!("owner=eq.{}", self.user)))]
        {
            let mut binding = json!({ "event": "INSERT", "schema": "public", "table": table });
            if let Some(filter) = filter {
                binding["filter"] = json!(filter);
            }
            let config = json!({ "postgres_changes": [binding] });
            socket.join_ok(&format!("realtime:{topic}"), config, Some(&self.token)).await?;
        }
        Ok(socket)
    }

    /// Until the connection has ended.
    async fn listen(&self, socket: &mut RealtimeSocket) {
        let mut beat = tokio::time::interval_at(tokio::time::Instant::now() + HEARTBEAT, HEARTBEAT);
        loop {
            let frame = tokio::select! {
                frame = socket.next_event(DEADLINE) => frame,
                _ = beat.tick() => match socket.send("phoenix", "heartbeat", json!({})).await {
                    Ok(_) => continue,
                    Err(_) => return,
                },
            };
            match frame {
                Ok(frame) if frame.event == "postgres_changes" => {
                    let heard = match frame.payload["data"]["table"].as_str() {
                        Some("notices") => &self.herd.heard_notice,
                        // Only one's own: a stranger's is never counted.
                        _ if frame.payload["data"]["record"]["owner"] == json!(self.user) => &self.herd.heard_letter,
                        _ => panic!("{} was told of a letter of somebody else: {}", self.user, frame.payload),
                    };
                    heard.fetch_add(1, Ordering::SeqCst);
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}

/// The statements that the server has sent to PostgreSQL since byte `from` of the log, by their text.
fn statements(postgres: &TestPostgres, from: usize) -> HashMap<String, usize> {
    let log = postgres.log();
    let mut counts = HashMap::new();
    let mut lines = log.get(from..).unwrap_or_default().lines().peekable();
    while let Some(line) = lines.next() {
        let Some((_, text)) = line.strip_prefix(&format!("{SERVE_ROLE}|")).and_then(|rest| rest.split_once("LOG:  ")) else {
            continue;
        };
        // `execute s1: select …` of the extended protocol, `statement: …` of the simple one.
        let sql = match text.split_once(": ") {
            Some((kind, sql)) if kind.starts_with("execute ") || kind == "statement" => sql,
            _ => continue,
        };
        // Some of ours begin with a new line.
        let sql = if sql.trim().is_empty() { lines.peek().copied().unwrap_or_default() } else { sql };
        let words: Vec<&str> = sql.split_whitespace().take(12).collect();
        *counts.entry(words.join(" ")).or_default() += 1;
    }
    counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p8_a_herd_of_stock_clients_comes_back_in_time_and_asks_nothing_of_the_database() -> Result<()> {
    let count: usize = std::env::var("WALCAST_HERD_CLIENTS").ok().and_then(|text| text.parse().ok()).unwrap_or(5_000);
    let postgres = TestPostgres::builder()
        .setting("log_statement", "all")
        .setting("log_line_prefix", "%u|")
        .setting("logging_collector", "off")
        .start()
        .await?;
    migrate(&postgres, SCHEMA, &["notices", "letters"]).await?;
    let mut server = Server::start(&postgres, &[("WALCAST_LOG__LEVEL", "error")]).await?;
    let herd = Arc::new(Herd::default());
    let mut animals: Vec<JoinHandle<()>> = Vec::new();
    let at_first = postgres.log().len();
    for n in 0..count {
        let user = format!("00000000-0000-4000-8000-{n:012x}");
        let token = server.token("authenticated", Some(&user));
        animals.push(tokio::spawn(Animal { herd: herd.clone(), url: server.url.clone(), token, user }.run()));
        if n % 64 == 63 {
            wait::until(DEADLINE, "these clients are live", async || herd.back.load(Ordering::SeqCst) >= n - 32).await?;
        }
    }
    let all_back = async || herd.back.load(Ordering::SeqCst) == count;
    wait::until(DEADLINE, "the whole herd is live", all_back).await?;
    ensure!(!statements(&postgres, at_first).is_empty(), "the log shows no statement: nothing would be counted");

    server.kill9().await?;
    wait::until(DEADLINE, "everybody has noticed", async || herd.back.load(Ordering::SeqCst) == 0).await?;
    let before = postgres.log().len();
    server.start_again().await?;
    let again = Instant::now();
    wait::until(BACK_WITHIN, format!("all {count} are back"), all_back).await?;
    let took = again.elapsed();
    let mut counts: Vec<_> = statements(&postgres, before).into_iter().collect();
    counts.sort_by_key(|(_, times)| std::cmp::Reverse(*times));
    let total: usize = counts.iter().map(|(_, times)| times).sum();
    let each = total as f64 / (2 * count) as f64;
    println!("{count} clients with 2 topics each were back after {took:?}; {total} statements, {each:.3} for each topic");
    for (sql, times) in counts.iter().take(5) {
        println!("{times:>7} × {sql}");
    }
    assert!(
        each < STATEMENTS_EACH,
        "{total} statements, {each:.2} for each topic that was joined again; most often: {:?}",
        counts.first()
    );

    // Back means live: everybody hears what concerns everybody, one each their own.
    postgres.execute("insert into notices values (1, 'to all')").await?;
    let letters = "insert into letters select n, ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'to you' \
                   from generate_series(0, $1::int - 1) n";
    postgres.connect().await?.execute(letters, &[&(count as i32)]).await.context("writing letters")?;
    let all_heard =
        async || herd.heard_notice.load(Ordering::SeqCst) == count && herd.heard_letter.load(Ordering::SeqCst) == count;
    wait::until(DEADLINE, "everybody has heard a notice and a letter", all_heard).await?;
    for animal in animals {
        animal.abort();
    }
    server.stop().await
}
