//! One key at the HTTP door, read and filled: who computes, what is answered meanwhile, and that there is nothing.

mod support;

use anyhow::{Context, Result, ensure};
use reqwest::{Client, Method};
use serde_json::Value;
use support::{DEADLINE, Server, migrate};
use walcast_testkit::{TestPostgres, wait};

const CONFIG: &str = r#"
[cache.namespaces.aging]
ttl = "1s"
stale_while_revalidate = "1h"
negative_ttl = "1h"
read = ["authenticated"]
"#;

struct Door {
    postgres: TestPostgres,
    server: Server,
    token: String,
    http: Client,
}

#[derive(Debug)]
struct Seen {
    status: u16,
    cache_status: String,
    ticket: Option<String>,
    compute: Option<String>,
    body: String,
}

impl Seen {
    fn code(&self) -> String {
        let problem: Value = serde_json::from_str(&self.body).unwrap_or_default();
        problem["code"].as_str().unwrap_or_default().to_owned()
    }

    fn ticket(&self) -> Result<&str> {
        self.ticket.as_deref().with_context(|| format!("no ticket: {self:?}"))
    }
}

impl Door {
    async fn open() -> Result<Door> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, "create table notes (id bigint primary key, body text)", &[]).await?;
        let server = Server::configured(&postgres, CONFIG, &[]).await?;
        let token = server.token("service_role", None);
        Ok(Door { postgres, server, token, http: Client::new() })
    }

    async fn ask(&self, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Seen> {
        self.ask_as(&self.token, method, path, headers, body).await
    }

    async fn ask_as(&self, token: &str, method: Method, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Seen> {
        let mut request = self.http.request(method, format!("{}/cache/v1/{path}", self.server.url)).bearer_auth(token);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.body(body.to_owned()).send().await?;
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(Seen {
            status: answer.status().as_u16(),
            cache_status: header("cache-status").unwrap_or_default(),
            ticket: header("walcast-ticket"),
            compute: header("walcast-compute"),
            body: answer.text().await?,
        })
    }

    async fn get(&self, path: &str) -> Result<Seen> {
        self.ask(Method::GET, path, &[], "").await
    }

    async fn put(&self, path: &str, ticket: &str, tags: &str, body: &str) -> Result<String> {
        let headers = [("walcast-ticket", ticket), ("cache-tag", tags), ("content-type", "text/plain")];
        Ok(self.ask(Method::PUT, path, &headers, body).await?.body)
    }

    async fn fill(&self, path: &str, tags: &str, body: &str) -> Result<()> {
        let miss = self.ask(Method::GET, path, &[("cache-control", "no-cache")], "").await?;
        let put = self.put(path, miss.ticket()?, tags, body).await?;
        ensure!(put == r#"{"stored":true}"#, "{put}");
        Ok(())
    }
}

#[tokio::test]
async fn of_many_who_find_a_key_missing_one_is_told_to_compute() -> Result<()> {
    let door = Door::open().await?;
    let (first, second) = (door.get("reports/1").await?, door.get("reports/1").await?);
    ensure!((first.status, first.compute.as_deref()) == (404, Some("lead")), "{first:?}");
    ensure!((second.status, second.compute.as_deref()) == (404, Some("wait")), "{second:?}");
    ensure!(first.cache_status == "walcast; fwd=miss; detail=absent" && second.ticket.is_some(), "{second:?}");
    ensure!(door.put("reports/1", second.ticket()?, "notes", "one").await? == r#"{"stored":true}"#);
    ensure!(door.get("reports/1").await?.body == "one");
    Ok(())
}

#[tokio::test]
async fn no_cache_hands_out_a_ticket_to_compute_what_is_there_anew() -> Result<()> {
    let door = Door::open().await?;
    door.fill("reports/1", "notes", "one").await?;
    ensure!(door.get("reports/1").await?.body == "one");
    let forced = door.ask(Method::GET, "reports/1", &[("cache-control", "max-age=0, no-cache")], "").await?;
    ensure!(forced.status == 404 && forced.cache_status == "walcast; fwd=request; detail=no_cache", "{forced:?}");
    ensure!(door.put("reports/1", forced.ticket()?, "notes", "two").await? == r#"{"stored":true}"#);
    ensure!(door.get("reports/1").await?.body == "two");
    Ok(())
}

#[tokio::test]
async fn an_old_value_is_answered_while_one_caller_puts_it_anew() -> Result<()> {
    let door = Door::open().await?;
    door.fill("aging/1", "notes", "old").await?;
    let reader = door.server.token("authenticated", Some("ann"));
    wait::until(DEADLINE, "its time is over", async || {
        let seen = door.ask_as(&reader, Method::GET, "aging/1", &[], "").await;
        seen.is_ok_and(|seen| seen.cache_status.contains("stale") && seen.ticket.is_none())
    })
    .await?;
    // Who may only read was not asked, so the first who may write is.
    let first = door.get("aging/1").await?;
    ensure!((first.status, first.body.as_str()) == (200, "old"), "{first:?}");
    ensure!(first.cache_status == "walcast; hit; stale; detail=revalidate", "{first:?}");
    for _ in 0..5 {
        let other = door.get("aging/1").await?;
        ensure!(other.body == "old" && other.cache_status == first.cache_status && other.ticket.is_none(), "{other:?}");
    }
    let fresh = door.ask(Method::GET, "aging/1", &[("walcast-at-least", "1")], "").await?;
    ensure!(fresh.status == 404, "who asks for at least this fresh is answered nothing old: {fresh:?}");
    let put = door.put("aging/1", first.ticket()?, "notes", "new").await?;
    ensure!(put == r#"{"stored":true}"#, "{put}");
    // A second later it is old again; a value that is not the old one it stays.
    ensure!(door.get("aging/1").await?.body == "new");
    door.postgres.execute("insert into notes values (1, 'touched')").await?;
    wait::until(DEADLINE, "the commit ends it, old or not", async || {
        door.get("aging/1").await.is_ok_and(|seen| seen.status == 404)
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn that_there_is_nothing_is_known_until_a_commit_says_otherwise() -> Result<()> {
    let door = Door::open().await?;
    let miss = door.get("aging/7").await?;
    let ticket = miss.ticket()?;
    let nothing = |tags| [("walcast-ticket", ticket), ("walcast-negative", "1"), ("cache-tag", tags)];
    let put = door.ask(Method::PUT, "aging/7", &nothing("notes:id=7"), "a body").await?;
    ensure!((put.status, put.code().as_str()) == (400, "bad_negative"), "{put:?}");
    let put = door.ask(Method::PUT, "aging/7", &nothing("notes:id=7"), "").await?;
    ensure!(put.body == r#"{"stored":true}"#, "{put:?}");

    let known = door.get("aging/7").await?;
    ensure!((known.status, known.code().as_str(), known.ticket.is_none()) == (404, "negative", true), "{known:?}");
    ensure!(
        known.cache_status.starts_with("walcast; hit; ttl=") && known.cache_status.ends_with("; detail=negative"),
        "{known:?}"
    );
    door.postgres.execute("insert into notes values (7, 'here now')").await?;
    wait::until(DEADLINE, "the commit says otherwise", async || {
        door.get("aging/7").await.is_ok_and(|seen| seen.code() == "miss")
    })
    .await?;

    let miss = door.get("reports/7").await?;
    let headers = [("walcast-ticket", miss.ticket()?), ("walcast-negative", "1")];
    let put = door.ask(Method::PUT, "reports/7", &headers, "").await?;
    ensure!((put.status, put.code().as_str()) == (422, "negative_not_kept"), "{put:?}");
    ensure!(put.body.contains("negative_ttl"), "{put:?}");
    Ok(())
}

/// One line or two: RFC 9110 says they mean the same.
#[tokio::test]
async fn p4_tags_in_two_header_lines_are_tags_and_what_can_be_said_once_is_refused_twice() -> Result<()> {
    let door = Door::open().await?;
    let miss = door.get("reports/7").await?;
    let ticket = miss.ticket()?;
    let two = [("walcast-ticket", ticket), ("cache-tag", "reports"), ("cache-tag", "notes:id=7, notes:id=8")];
    let put = door.ask(Method::PUT, "reports/7", &two, "seven").await?;
    ensure!(put.body == r#"{"stored":true}"#, "{put:?}");
    ensure!(door.get("reports/7").await?.body == "seven");
    door.postgres.execute("insert into notes values (7, 'touched')").await?;
    wait::until(DEADLINE, "the commit ends it, by the second line", async || {
        door.get("reports/7").await.is_ok_and(|seen| seen.status == 404)
    })
    .await?;

    for (name, one, other) in [
        ("walcast-ticket", ticket, "another"),
        ("walcast-written", "1", "2"),
        ("walcast-negative", "1", "1"),
        ("content-type", "text/plain", "text/html"),
    ] {
        let put = door.ask(Method::PUT, "reports/7", &[(name, one), (name, other)], "x").await?;
        ensure!((put.status, put.code().as_str()) == (400, "bad_header"), "{name}: {put:?}");
    }
    let fresh = door.ask(Method::GET, "reports/7", &[("walcast-at-least", "1"), ("walcast-at-least", "2")], "").await?;
    ensure!((fresh.status, fresh.code().as_str()) == (400, "bad_position"), "{fresh:?}");

    // Directives are no matter of case; taken for none, the value would live as long as the namespace says.
    let miss = door.get("reports/8").await?;
    let short = [("walcast-ticket", miss.ticket()?), ("cache-control", "private"), ("cache-control", "Max-Age=5")];
    ensure!(door.ask(Method::PUT, "reports/8", &short, "eight").await?.body == r#"{"stored":true}"#);
    let seen = door.get("reports/8").await?;
    let ttl = seen.cache_status.split("; ").find_map(|part| part.strip_prefix("ttl=")).context("a ttl")?;
    ensure!(ttl.parse::<u64>()? <= 5, "{seen:?}");
    Ok(())
}

#[tokio::test]
async fn a_reader_who_has_the_value_among_others_is_told_so() -> Result<()> {
    let door = Door::open().await?;
    door.fill("reports/1", "notes", "one").await?;
    let url = format!("{}/cache/v1/reports/1", door.server.url);
    let answer = door.http.get(&url).bearer_auth(&door.token).send().await?;
    let etag = answer.headers()["etag"].to_str()?.to_owned();
    for (list, status) in [
        (vec![etag.clone()], 304),
        (vec![format!("\"x\", {etag}")], 304),
        (vec![format!("W/{etag}")], 304),
        (vec!["*".to_owned()], 304),
        (vec!["\"x\"".to_owned(), etag.clone()], 304),
        (vec!["\"x\"".to_owned()], 200),
    ] {
        let lines: Vec<_> = list.iter().map(|line| ("if-none-match", line.as_str())).collect();
        let seen = door.ask(Method::GET, "reports/1", &lines, "").await?;
        ensure!(seen.status == status, "{list:?}: {seen:?}");
    }
    Ok(())
}
