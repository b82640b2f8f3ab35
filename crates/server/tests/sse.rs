//! Event streams as curl and `EventSource` meet them: a thousand at once, with a header, a ticket or a cookie, no more of
//! one user than allowed, and gone without a trace.
//!
//! Promises P3 (tickets, cookies), P7 and P9.

mod support;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, SECRET, Server, memory, migrate};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
};
use walcast_engine::model::Position;
use walcast_testkit::{SseStream, TestPostgres, jwt, wait};

const SCHEMA: &str = "create table vitals (id bigint primary key, patient_id bigint, rate int, note text);
    alter table vitals replica identity full;
    grant select on vitals to authenticated, service_role;";
const RESOURCE: &str = "/sse/v1/changes?table=vitals&filter=patient_id=eq.7";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["vitals"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

async fn statistics(server: &Server) -> Result<Value> {
    let asked = reqwest::Client::new().get(format!("{}/admin/v1/sse", server.url));
    Ok(asked.bearer_auth(server.token("service_role", None)).send().await?.json().await?)
}

async fn metric(server: &Server, name: &str) -> Result<f64> {
    let text = reqwest::get(format!("{}/metrics", server.url)).await?.text().await?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.with_context(|| format!("no metric {name}"))?.parse().context("no number")
}

/// A socket and what came over it: what curl is, without the process.
struct Bare {
    socket: TcpStream,
    heard: Vec<u8>,
}

impl Bare {
    async fn open(server: &Server, token: &str) -> Result<Bare> {
        let mut socket = TcpStream::connect(server.url.trim_start_matches("http://")).await?;
        let request = format!("GET {RESOURCE} HTTP/1.1\r\nHost: walcast\r\nAuthorization: Bearer {token}\r\n\r\n");
        socket.write_all(request.as_bytes()).await?;
        let mut bare = Bare { socket, heard: Vec::new() };
        bare.until("event: live").await?;
        Ok(bare)
    }

    async fn until(&mut self, text: &str) -> Result<()> {
        let read = async {
            while !self.heard.windows(text.len()).any(|window| window == text.as_bytes()) {
                let read = self.socket.read_buf(&mut self.heard).await?;
                ensure!(read > 0, "ended before {text:?}: {}", String::from_utf8_lossy(&self.heard));
            }
            Ok(())
        };
        tokio::time::timeout(DEADLINE, read).await.with_context(|| format!("no {text:?}"))?
    }

    fn changes(&self) -> usize {
        String::from_utf8_lossy(&self.heard).matches("event: change\n").count()
    }
}

#[tokio::test]
async fn p7_p9_a_thousand_streams_hear_every_change_and_leave_nothing_behind() -> Result<()> {
    const STREAMS: usize = 1_000;
    const CHANGES: usize = 20;
    let (postgres, server) = serving(&[]).await?;
    let pid = server.pid().context("no process")?;
    let open = async |n: usize| Bare::open(&server, &server.token("authenticated", Some(&format!("user-{n}")))).await;
    let mut streams = Vec::new();
    for n in 0..100 {
        streams.push(open(n).await?);
    }
    let before = memory::resident_bytes(pid)?;
    for n in 100..STREAMS {
        streams.push(open(n).await?);
    }
    let each = memory::resident_bytes(pid)?.saturating_sub(before) / (STREAMS as u64 - 100);
    println!("{each} bytes of memory for each of {STREAMS} streams");
    ensure!(each < 128 << 10, "{each} bytes a stream");
    let now = statistics(&server).await?;
    assert_eq!((&now["streams"], &now["resources"][0]["users"]), (&json!(STREAMS), &json!(STREAMS)));

    let writer = postgres.connect().await?;
    for id in 1..CHANGES as i64 {
        writer.execute("insert into vitals values ($1, 7, 80), ($1 + 1000, 8, 80)", &[&id]).await?;
    }
    writer.execute("insert into vitals values (4711, 7, 80)", &[]).await?;
    for stream in &mut streams {
        stream.until("\"id\":4711").await?;
        assert_eq!(stream.changes(), CHANGES, "each once, and nothing of patient 8");
    }
    assert_eq!(statistics(&server).await?["resources"][0]["delivered"], STREAMS * CHANGES);

    drop(streams);
    wait::until(DEADLINE, "all are gone", async || {
        metric(&server, "walcast_subscriptions").await.ok() == Some(0.0)
            && metric(&server, "walcast_connections").await.ok() == Some(0.0)
            && statistics(&server).await.is_ok_and(|now| now["streams"] == 0 && now["resources_listened_to"] == 0)
    })
    .await?;
    server.stop().await
}

#[tokio::test]
async fn p7_one_user_has_so_many_streams_on_one_resource_and_is_told_which_limit() -> Result<()> {
    let (_postgres, server) = serving(&[("WALCAST_SSE__MAX_STREAMS_PER_RESOURCE", "3")]).await?;
    let ada = server.token("authenticated", Some("ada"));
    let url = format!("{}{RESOURCE}", server.url);
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut stream = SseStream::open(&url, Some(&ada), None).await?;
        assert_eq!(stream.next(DEADLINE).await?.event, "live");
        held.push(stream);
    }
    let refused = SseStream::open(&url, Some(&ada), None).await?;
    assert_eq!((refused.status(), refused.header("content-type")), (429, Some("application/problem+json")));
    let seconds: u64 = refused.header("retry-after").context("no Retry-After")?.parse()?;
    assert!((1..=5).contains(&seconds), "{seconds}");
    let problem: Value = serde_json::from_str(&refused.text(DEADLINE).await?)?;
    assert_eq!(problem["code"], "too_many_streams");
    assert!(problem["title"].as_str().is_some_and(|title| title.contains("sse.max_streams_per_resource = 3")), "{problem}");
    assert!(problem["hint"].is_string(), "{problem}");

    // Others, and other patients, have theirs.
    for (user, filter) in [("bob", "patient_id=eq.7"), ("ada", "patient_id=eq.8")] {
        let url = format!("{}/sse/v1/changes?table=vitals&filter={filter}", server.url);
        assert_eq!(SseStream::open(&url, Some(&server.token("authenticated", Some(user))), None).await?.status(), 200);
    }
    let report = statistics(&server).await?;
    assert_eq!((&report["refused"], &report["resources"][0]["refused"]), (&json!(1), &json!(1)));
    assert_eq!(report["resources"][0]["resource"], "public.vitals?patient_id=eq.7");
    let reached = metric(&server, "walcast_limits_reached_total{limit=\"sse.max_streams_per_resource\"}").await?;
    assert_eq!(reached, 1.0);
    // Room again as soon as one has gone.
    held.pop();
    wait::until(DEADLINE, "there is room again", async || {
        SseStream::open(&url, Some(&ada), None).await.is_ok_and(|stream| stream.status() == 200)
    })
    .await?;
    let anon = reqwest::Client::new().get(format!("{}/admin/v1/sse", server.url)).bearer_auth(&ada).send().await?;
    assert_eq!(anon.status(), 403);
    server.stop().await
}

async fn ticket(server: &Server, token: &str, resource: &str) -> Result<Value> {
    let asked = reqwest::Client::new().post(format!("{}/sse/v1/ticket", server.url)).bearer_auth(token);
    let answer = asked.body(json!({ "resource": resource }).to_string()).send().await?;
    let (status, text) = (answer.status(), answer.text().await?);
    ensure!(status == 200, "{status}: {text}");
    Ok(serde_json::from_str(&text)?)
}

#[tokio::test]
async fn p3_a_ticket_opens_its_own_stream_again_and_again_until_it_expires() -> Result<()> {
    let (postgres, mut server) = serving(&[]).await?;
    let ada = jwt(SECRET, "authenticated", Some("ada"), 3600, json!({}));
    let given = ticket(&server, &ada, RESOURCE).await?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let left = given["expires_at"].as_u64().context("no expires_at")?.saturating_sub(now);
    assert!((500..=600).contains(&left), "ten minutes, though the token lives for an hour: {left}");
    let url = format!("{}{}", server.url, given["url"].as_str().context("no url")?);
    assert!(!url.contains(&ada), "the token is not to be read in the address");

    let mut first = SseStream::open(&url, None, None).await?;
    let live = first.next(DEADLINE).await?;
    assert_eq!(live.event, "live");
    drop(first);
    postgres.execute("insert into vitals values (1, 7, 80)").await?;
    // As `EventSource` comes back: the same address, with the last id; also after a restart of the server.
    server.kill9().await?;
    server.start_again().await?;
    let mut again = SseStream::open(&url, None, live.id.as_deref()).await?;
    assert_eq!(again.next(DEADLINE).await?.event, "resumed");
    let change = again.next_where(|event| event.event == "change", DEADLINE).await?;
    assert_eq!(change.json()?["record"]["id"], 1);

    let ticket_text = given["ticket"].as_str().context("no ticket")?;
    let status = async |resource: &str, ticket: &str| -> Result<(u16, Value)> {
        let stream = SseStream::open(&format!("{}{resource}&ticket={ticket}", server.url), None, None).await?;
        Ok((stream.status(), serde_json::from_str(&stream.text(DEADLINE).await?)?))
    };
    for other in
        ["/sse/v1/changes?table=vitals&filter=patient_id=eq.8", "/sse/v1/changes?table=vitals", "/sse/v1/changes?schema=public"]
    {
        let (status, problem) = status(other, ticket_text).await?;
        assert_eq!((status, &problem["code"]), (401, &json!("bad_ticket")), "{other}");
    }
    assert_eq!(status(RESOURCE, "AAAA").await?.0, 401);
    // A ticket makes no ticket, and opens nothing else.
    let post = reqwest::Client::new().post(format!("{}/sse/v1/ticket?ticket={ticket_text}", server.url));
    assert_eq!(post.body(json!({ "resource": RESOURCE }).to_string()).send().await?.status(), 401);
    assert_eq!(reqwest::get(format!("{}/cache/v1/n/k?ticket={ticket_text}", server.url)).await?.status(), 401);
    for bad in
        ["/cache/v1/n/k", "https://else.where/sse/v1/changes?table=vitals", "/sse/v1/changes", &format!("{RESOURCE}&apikey=x")]
    {
        assert!(ticket(&server, &ada, bad).await.is_err(), "{bad}");
    }
    server.stop().await
}

#[tokio::test]
async fn a_stream_says_that_its_token_or_ticket_has_expired_before_it_ends() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let short = jwt(SECRET, "authenticated", Some("ada"), 3, json!({}));
    let given = ticket(&server, &short, RESOURCE).await?;
    let by_ticket = format!("{}{}", server.url, given["url"].as_str().context("no url")?);
    let by_token = format!("{}{RESOURCE}", server.url);
    for (url, token) in [(&by_ticket, None), (&by_token, Some(short.as_str()))] {
        let mut stream = SseStream::open(url, token, None).await?;
        if stream.status() == 200 {
            let events = stream.until_end(DEADLINE).await?;
            assert_eq!(events.first().map(|event| event.event.as_str()), Some("live"));
            assert_eq!(events.last().map(|event| event.event.as_str()), Some("expired"));
        }
        // Whoever comes back is asked anew.
        assert_eq!(SseStream::open(url, token, None).await?.status(), 401);
    }
    server.stop().await
}

#[tokio::test]
async fn p3_a_cookie_counts_where_the_settings_say_so_and_for_pages_of_allowed_origins_alone() -> Result<()> {
    const ORIGIN: &str = "https://app.example.com";
    let settings = [("WALCAST_SSE__COOKIE", "access_token"), ("WALCAST_SERVER__ALLOWED_ORIGINS", ORIGIN)];
    let (_postgres, server) = serving(&settings).await?;
    let token = server.token("authenticated", Some("ada"));
    let http = reqwest::Client::new();
    let ask = async |path: &str, headers: &[(&str, &str)]| {
        let mut asked = http.get(format!("{}{path}", server.url)).header("cookie", format!("other=1; access_token={token}"));
        for (name, value) in headers {
            asked = asked.header(*name, *value);
        }
        asked.send().await
    };
    let allowed = ask(RESOURCE, &[("origin", ORIGIN)]).await?;
    assert_eq!(allowed.status(), 200);
    assert_eq!(allowed.headers()["access-control-allow-origin"], ORIGIN);
    assert_eq!(allowed.headers()["access-control-allow-credentials"], "true");
    assert_eq!(ask(RESOURCE, &[("sec-fetch-site", "same-origin")]).await?.status(), 200);

    for headers in [&[("origin", "https://evil.example")][..], &[("sec-fetch-site", "cross-site")], &[]] {
        let refused = ask(RESOURCE, headers).await?;
        assert_eq!(refused.status(), 403, "{headers:?}");
        assert_ne!(refused.headers().get("access-control-allow-credentials").map(|value| value.as_bytes()), Some(&b"true"[..]));
    }
    for path in ["/cache/v1/n/k", "/admin/v1/sse", "/query/v1/q"] {
        assert_eq!(ask(path, &[("origin", ORIGIN)]).await?.status(), 401, "{path}");
    }
    server.stop().await?;

    let (_postgres, server) = serving(&[]).await?;
    let asked = http.get(format!("{}{RESOURCE}", server.url)).header("sec-fetch-site", "same-origin");
    let without = asked.header("cookie", format!("access_token={}", server.token("authenticated", Some("ada")))).send().await?;
    assert_eq!(without.status(), 401, "off unless set");
    server.stop().await
}

/// The kernel goes on acknowledging for a program that hangs until its buffer is full; then nothing moves any more, as with
/// a client whose network is gone.
#[tokio::test]
async fn p9_a_stream_whose_socket_no_longer_moves_is_gone_within_minutes() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let ada = server.token("authenticated", Some("ada"));
    let _hangs = Bare::open(&server, &ada).await?;
    // More than the sockets' buffers hold.
    for batch in 0..15 {
        let sql =
            format!("insert into vitals select {batch} * 100 + n, 7, 80, repeat('x', 20000) from generate_series(1, 100) n");
        postgres.execute(&sql).await?;
    }
    wait::until(4 * DEADLINE, "the stream is gone", async || {
        metric(&server, "walcast_subscriptions").await.ok() == Some(0.0)
            && statistics(&server).await.is_ok_and(|now| now["streams"] == 0)
    })
    .await?;
    server.stop().await
}

#[tokio::test]
async fn curl_hears_changes_and_a_sign_of_life_where_there_are_none() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let token = server.token("authenticated", Some("ada"));
    let mut curl = Command::new("curl")
        .args(["-sS", "-N", "-i", "-H", &format!("Authorization: Bearer {token}"), &format!("{}{RESOURCE}", server.url)])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("curl is missing")?;
    let mut out = curl.stdout.take().context("no output")?;
    let mut heard = Vec::new();
    let mut until = async |text: &str| -> Result<String> {
        let read = async {
            while !String::from_utf8_lossy(&heard).contains(text) {
                ensure!(out.read_buf(&mut heard).await? > 0, "curl ended: {}", String::from_utf8_lossy(&heard));
            }
            Ok(String::from_utf8_lossy(&heard).into_owned())
        };
        tokio::time::timeout(DEADLINE, read).await.with_context(|| format!("no {text:?}"))?
    };
    let head = until("event: live").await?.to_ascii_lowercase();
    for line in ["content-type: text/event-stream", "x-accel-buffering: no", "cache-control: no-cache, no-transform", "retry: "] {
        assert!(head.contains(line), "{line} in {head}");
    }
    postgres.execute("insert into vitals values (1, 7, 80)").await?;
    until("\"id\":1").await?;
    until("event: position").await?;
    curl.kill().await?;
    wait::until(DEADLINE, "the stream is gone", async || metric(&server, "walcast_subscriptions").await.ok() == Some(0.0))
        .await?;
    server.stop().await
}

#[tokio::test]
async fn p2_a_stream_that_is_read_late_has_missed_nothing_or_is_told_so() -> Result<()> {
    const ROWS: i64 = 60_000;
    let (postgres, server) = serving(&[("WALCAST_REALTIME__OUTBOX_BYTES", "64KiB")]).await?;
    let ada = server.token("authenticated", Some("ada"));
    let mut stream = SseStream::open(&format!("{}{RESOURCE}", server.url), Some(&ada), None).await?;
    assert_eq!(stream.next(DEADLINE).await?.event, "live");
    // More than the outbox and the sockets' buffers hold together, a few hundred rows a commit.
    let sql = format!(
        "do $$ begin for n in 1..{ROWS} loop
        insert into vitals values (n, 7, 80); if n % 300 = 0 then commit; end if; end loop; end $$"
    );
    postgres.execute(&sql).await?;
    let written: String = postgres.connect().await?.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
    let written: Position = format!("00000000/{written}/0").parse()?;
    wait::until(2 * DEADLINE, "everything is announced", async || {
        let ready: Result<Value, _> = async { reqwest::get(format!("{}/readyz", server.url)).await?.json().await }.await;
        let announced = ready.ok().and_then(|ready| ready["position"].as_str()?.parse::<Position>().ok());
        announced.is_some_and(|announced| announced.lsn >= written.lsn)
    })
    .await?;
    let mut next = 1;
    while next <= ROWS {
        let event = stream.next_where(|event| ["change", "resync"].contains(&event.event.as_str()), DEADLINE).await?;
        if event.event == "resync" {
            println!("told to read again at {next}");
            break;
        }
        assert_eq!(event.json()?["record"]["id"], next, "in order, none left out, none twice");
        next += 1;
    }
    server.stop().await
}
