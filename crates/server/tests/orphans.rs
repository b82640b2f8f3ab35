//! Promise P9: every subscription has an owner, and when the owner goes, however it goes, everything of it is gone. Storms of
//! clients that join, leave, are refused, hang up, crash and fall silent; then the registry is compared with who is left.

mod support;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{
    DEADLINE, SECRET, Server, memory, migrate,
    registry::{Topics, admin, gauge, in_memory, in_the_table},
};
use tokio::task::JoinSet;
use walcast_testkit::{Proxy, RealtimeSocket, SseStream, TestPostgres, Vsn, jwt, wait};

const SCHEMA: &str = "
create table plain (id bigint primary key, n int);
grant select on plain to anon, authenticated, service_role;
create table closed (id bigint primary key);
grant select on closed to service_role;";

/// Clients of one storm, and how many of them are there at once. Each does a dozen things.
const CLIENTS: usize = 900;
const AT_ONCE: usize = 30;
const TOPICS: usize = 10;
/// Of a storm's clients, one in so many stays, and one falls silent.
const STAYS: usize = 18;
const SILENT: usize = 9;

fn plain(id: usize) -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "plain", "filter": format!("id=eq.{id}") }] })
}

fn subject(n: usize) -> String {
    format!("client {n}")
}

/// How a client ends.
enum End {
    Stays(Box<RealtimeSocket>, Vec<(String, String)>),
    /// Its network has gone; nobody says goodbye.
    Silent(Box<RealtimeSocket>),
    Gone,
}

/// One client's life. How many joins, refused joins, leaves and ends it made.
async fn client(url: Arc<str>, through_proxy: Arc<str>, token: String, n: usize) -> Result<(usize, End)> {
    let subject = subject(n);
    let (stays, silent) = (n.is_multiple_of(STAYS), n % SILENT == 1);
    let vsn = if n.is_multiple_of(2) { Vsn::V2 } else { Vsn::V1 };
    let mut socket = RealtimeSocket::connect(if silent { &through_proxy } else { &url }, &token, vsn).await?;
    let mut topics = Vec::new();
    let mut acts = 1;
    for topic in 0..TOPICS {
        let name = format!("realtime:{topic}");
        match topic {
            // No right to the table: refused.
            3 => {
                let closed = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "closed" }] });
                let reply = socket.join(&name, closed, None).await?;
                ensure!(reply["status"] == "error", "{reply}");
            }
            // Joined twice: the second takes the place of the first.
            5 => {
                socket.join_ok(&name, plain(n), None).await?;
                socket.join_ok(&name, plain(n + 1), None).await?;
                topics.push((subject.clone(), name));
                acts += 1;
            }
            // Nobody waits for the answer of the last.
            9 if !stays && !silent => {
                socket.send(&name, "phx_join", json!({ "config": plain(n) })).await?;
            }
            _ => {
                let config = if topic.is_multiple_of(4) { json!({}) } else { plain(n * TOPICS + topic) };
                socket.join_ok(&name, config, None).await?;
                topics.push((subject.clone(), name));
            }
        }
        acts += 1;
    }
    for topic in [1, 2] {
        let name = format!("realtime:{topic}");
        socket.leave(&name).await?;
        topics.retain(|(_, topic)| *topic != name);
        acts += 1;
    }
    let end = match n {
        _ if stays => End::Stays(Box::new(socket), topics),
        _ if silent => End::Silent(Box::new(socket)),
        _ if n.is_multiple_of(3) => {
            socket.abort()?;
            End::Gone
        }
        _ if n % 3 == 1 => {
            socket.close().await?;
            End::Gone
        }
        // Hangs up without a word.
        _ => {
            drop(socket);
            End::Gone
        }
    };
    Ok((acts, end))
}

/// Those who stay beat, like stock clients, until they are dropped.
fn keep_alive(mut sockets: Vec<RealtimeSocket>) -> tokio::task::JoinHandle<Result<()>> {
    tokio::spawn(async move {
        loop {
            for socket in &mut sockets {
                socket.heartbeat().await?;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    })
}

struct Storm {
    acts: usize,
    left: Topics,
    alive: tokio::task::JoinHandle<Result<()>>,
    streams: Vec<SseStream>,
    _silent: Vec<RealtimeSocket>,
}

async fn storm(server: &Server, proxy: &Proxy, tokens: &[String]) -> Result<Storm> {
    proxy.resume();
    let url: Arc<str> = server.url.as_str().into();
    let through_proxy: Arc<str> = format!("http://127.0.0.1:{}", proxy.port()).into();
    let (mut acts, mut left, mut stay, mut silent) = (0, BTreeMap::new(), Vec::new(), Vec::new());
    let mut running = JoinSet::new();
    let mut streams = Vec::new();
    for (n, token) in tokens.iter().enumerate() {
        running.spawn(client(url.clone(), through_proxy.clone(), token.clone(), n));
        if n.is_multiple_of(50) {
            // Event streams are owned like sockets: half of them are dropped at once.
            let address = format!("{url}/sse/v1/changes?table=plain&filter=id=eq.{n}");
            let stream = SseStream::open(&address, Some(token), None).await?;
            ensure!(stream.status() == 200, "the stream was refused");
            acts += 1;
            if n.is_multiple_of(100) {
                *left.entry((subject(n), "sse:changes".to_owned())).or_default() += 1;
                streams.push(stream);
            }
        }
        if running.len() < AT_ONCE && n + 1 < CLIENTS {
            continue;
        }
        while let Some(ended) = running.join_next().await {
            let (made, end) = ended??;
            acts += made;
            match end {
                End::Stays(socket, topics) => {
                    topics.into_iter().for_each(|topic| *left.entry(topic).or_default() += 1);
                    stay.push(*socket);
                }
                End::Silent(socket) => silent.push(*socket),
                End::Gone => {}
            }
            if running.len() < AT_ONCE && n + 1 < CLIENTS {
                break;
            }
        }
        // Also while the storm lasts: it may take longer than the idle rule.
        if n % 100 == 99 {
            for socket in &mut stay {
                socket.heartbeat().await?;
            }
        }
    }
    // From here on nothing passes: neither their goodbye nor ours.
    proxy.pause();
    Ok(Storm { acts, left, alive: keep_alive(stay), streams, _silent: silent })
}

/// The registry, its gauges and its table say exactly this, and soon.
async fn equals(postgres: &TestPostgres, server: &Server, expected: &Topics, connections: usize) -> Result<()> {
    let topics: usize = expected.values().sum();
    wait::until(DEADLINE, "the memory equals who is left", async || {
        in_memory(server).await.is_ok_and(|found| found == *expected)
            && gauge(server, "walcast_topics ").await.is_ok_and(|count| count == Some(topics as f64))
            && gauge(server, "walcast_connections ").await.is_ok_and(|count| count == Some(connections as f64))
    })
    .await?;
    let page = admin(server, "/admin/v1/connections?limit=1").await?;
    ensure!(page["total"] == connections, "{} connections are listed, {connections} are there", page["total"]);
    wait::until(DEADLINE, "the table equals who is left", async || {
        in_the_table(postgres).await.is_ok_and(|found| found == *expected)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn p9_after_a_storm_the_registry_equals_who_is_left_and_memory_returns() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["plain", "closed"]).await?;
    let settings = [("WALCAST_REALTIME__IDLE_TIMEOUT", "10s")];
    let server = Server::start(&postgres, &settings).await?;
    let port = server.url.rsplit(':').next().and_then(|port| port.parse().ok()).context("a port")?;
    let proxy = Proxy::to(port).await?;
    let pid = server.pid().context("a process")?;
    let mut resident = Vec::new();
    // The same in each storm, so that what is remembered of tokens is the same, too.
    let token = |n| jwt(SECRET, "authenticated", Some(&subject(n)), 3600, json!({}));
    let tokens: Vec<String> = (0..CLIENTS).map(token).collect();
    for _ in 0..3 {
        let storm = storm(&server, &proxy, &tokens).await?;
        ensure!(storm.acts >= 10_000, "a storm of {} acts", storm.acts);
        // The control: this comparison sees orphans. Who has fallen silent is still registered, and too many.
        let silent = in_memory(&server).await?;
        ensure!(silent != storm.left && silent.values().sum::<usize>() > storm.left.values().sum(), "the silent were not seen");
        let kept = CLIENTS.div_ceil(STAYS) + storm.streams.len();
        equals(&postgres, &server, &storm.left, kept).await?;
        // And here: a row without a subscription is seen.
        let orphan = "insert into walcast.subscription_registry select instance, 1, connection_id, kind, app, component, tenant, role,
            'nobody', peer, topic, bindings, since, last_heartbeat, 0, 0, 0, 0, null, 0, null from walcast.subscription_registry limit 1";
        postgres.execute(orphan).await?;
        ensure!(in_the_table(&postgres).await? != storm.left, "an orphan in the table was not seen");
        postgres.execute("delete from walcast.subscription_registry where id = 1").await?;
        // They have lived all the while.
        ensure!(!storm.alive.is_finished(), "one who stayed was sent away: {:?}", storm.alive.await?);
        storm.alive.abort();
        drop((storm.streams, storm._silent));
        equals(&postgres, &server, &Topics::new(), 0).await?;
        resident.push(memory::resident_bytes(pid)?);
    }
    eprintln!("resident after each storm: {resident:?} bytes");
    // What two storms leave behind of every entry would be more than this; the allocator's own ups and downs are less.
    ensure!(resident[2] < resident[0] + (8 << 20), "memory does not return: {resident:?}");
    server.stop().await
}
