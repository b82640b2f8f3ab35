//! Values from elsewhere (`source = "external"`) seen from outside: over restarts, with PostgreSQL hanging in the middle of a
//! put, while nobody waits for the answer, and what the config says about "there is nothing" and lives by name.

mod support;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use support::{DEADLINE, SERVE_ROLE, Server, migrate, reads::Reads};
use walcast_testkit::{Proxy, TestPostgres, wait};

const CONFIG: &str = "
[cache.namespaces.session]
source = 'external'
ttl = 'very_long'
ttl_jitter = '0%'
negative_ttl = '1h'
";

struct House {
    postgres: TestPostgres,
    server: Server,
    proxy: Proxy,
    http: reqwest::Client,
    _directory: tempfile::TempDir,
}

impl House {
    async fn open(settings: &[(&str, &str)]) -> Result<House> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, "create table items (id bigint primary key)", &[]).await?;
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("walcast.toml");
        std::fs::write(&config, CONFIG)?;
        let config = config.to_string_lossy().into_owned();
        let proxy = Proxy::to(postgres.port()).await?;
        let url = format!("postgres://{SERVE_ROLE}@127.0.0.1:{}/postgres", proxy.port());
        let settings: Vec<_> = settings.iter().copied().chain([("WALCAST_CONFIG", config.as_str())]).collect();
        let server = Server::start_at(&url, &settings).await?;
        Ok(House { postgres, server, proxy, http: reqwest::Client::new(), _directory: directory })
    }

    fn request(&self, method: Method, key: &str) -> reqwest::RequestBuilder {
        let url = format!("{}/cache/v1/session/{key}", self.server.url);
        self.http.request(method, url).bearer_auth(self.server.token("service_role", None))
    }

    /// The status, and the JSON of the answer.
    async fn ask(&self, request: reqwest::RequestBuilder) -> Result<(u16, Value)> {
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let text = answer.text().await?;
        Ok((status, serde_json::from_str(&text).with_context(|| format!("{status}: {text}"))?))
    }

    /// `stored`, or the reason why not.
    async fn put(&self, key: &str, text: &str) -> Result<String> {
        let request = self.request(Method::PUT, key).header("cache-tag", "user:ann").body(text.to_owned());
        let (status, answer) = self.ask(request).await?;
        ensure!(status == 200, "{status}: {answer}");
        let reason = answer["reason"].as_str().unwrap_or("stored");
        Ok(reason.to_owned())
    }

    async fn get(&self, key: &str) -> Result<String> {
        let seen = Reads::service(&self.server).get(&format!("/cache/v1/session/{key}")).await?;
        Ok(if seen.is_fresh_hit() { format!("hit {}", seen.body) } else { seen.cache_status })
    }

    /// A put that goes until it is stored: what was not confirmed lately is not stored before the stream has gone on.
    async fn put_until_stored(&self, key: &str, text: &str) -> Result<()> {
        wait::until(DEADLINE, format!("{text} is stored"), async || self.put(key, text).await.is_ok_and(|told| told == "stored"))
            .await
    }

    async fn kill_and_start(&mut self) -> Result<()> {
        self.server.kill9().await?;
        self.server.start_again().await
    }
}

#[tokio::test]
async fn what_was_answered_as_stored_is_a_hit_after_a_kill_and_what_was_dropped_is_not() -> Result<()> {
    let mut house = House::open(&[]).await?;
    for text in ["one", "two"] {
        ensure!(house.put("ann", text).await? == "stored");
    }
    ensure!(house.put("bo", "bo").await? == "stored");
    let (_, answer) = house
        .ask(house.request(Method::POST, "mset").json(&json!({ "entries": [
            { "key": "a", "value": 1, "ttl": "long" }, { "key": "b", "negative": true }, { "key": "c", "value": 3, "ttl": "90m" },
            { "key": "d", "value": 4, "ttl": "for ever" }, { "key": "e", "value": 4, "negative": true }
        ]})))
        .await?;
    let told: Vec<_> = answer["results"].as_array().context("results")?.iter().map(|one| &one["stored"] == true).collect();
    ensure!(told == [true, true, true, false, false], "{answer}");
    ensure!(answer["results"][3]["detail"].as_str().is_some_and(|why| why.contains("very_long")), "{answer}");
    house.request(Method::DELETE, "bo").send().await?.error_for_status()?;

    for _ in 0..2 {
        house.kill_and_start().await?;
        ensure!(house.get("ann").await? == "hit two", "{}", house.get("ann").await?);
        ensure!(house.get("bo").await?.contains("fwd=miss"));
        let (_, answer) = house.ask(house.request(Method::POST, "mget").json(&json!({ "keys": ["a", "b", "c"] }))).await?;
        let entries = answer["entries"].as_array().context("entries")?;
        ensure!(entries.iter().all(|entry| entry["status"] == "hit"), "{answer}");
        ensure!(entries[1]["negative"] == true && entries[0]["value"] == 1, "{answer}");
        let within = |entry: &Value, most: u64| entry["ttl_ms"].as_u64().is_some_and(|ttl| ttl <= most && ttl > most - 600_000);
        ensure!(within(&entries[0], 3_600_000) && within(&entries[1], 3_600_000) && within(&entries[2], 5_400_000), "{answer}");
    }
    Reads::service(&house.server).invalidate(json!({ "tags": ["user:ann"] })).await?;
    house.kill_and_start().await?;
    ensure!(house.get("ann").await?.contains("fwd=miss"));
    house.server.stop().await
}

/// A transaction of somebody's holds the row, so the stream is heard and the put cannot be confirmed.
#[tokio::test]
async fn an_old_session_never_comes_back_after_a_put_that_was_not_confirmed() -> Result<()> {
    let mut house = House::open(&[]).await?;
    ensure!(house.put("ann", "old").await? == "stored");
    let mut holder = house.postgres.connect().await?;
    let lock = holder.transaction().await?;
    lock.execute("update walcast.cache_entries set hits = hits where key = 'ann'", &[]).await?;
    ensure!(house.put("ann", "new").await? == "l2_away");
    ensure!(house.get("ann").await?.contains("fwd=miss"), "{}", house.get("ann").await?);
    lock.rollback().await?;
    let there: Vec<u8> = holder.query_one("select value from walcast.cache_entries where key = 'ann'", &[]).await?.get(0);
    ensure!(there == b"old", "control: the table has it still, so it is the clock that judges");
    ensure!(house.get("ann").await?.contains("fwd=miss"));

    // A checkpoint has taken it along before the kill.
    let end: String = holder.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
    let sql = format!("select 1 from walcast.sentinel where clock_lsn > '{end}'::pg_lsn");
    wait::until(DEADLINE, "a checkpoint later than that", async || {
        holder.query(&sql, &[]).await.is_ok_and(|rows| rows.len() == 1)
    })
    .await?;
    house.kill_and_start().await?;
    ensure!(house.get("ann").await?.contains("fwd=miss"), "{}", house.get("ann").await?);
    house.put_until_stored("ann", "newest").await?;
    house.kill_and_start().await?;
    ensure!(house.get("ann").await? == "hit newest");
    house.server.stop().await
}

#[tokio::test]
async fn while_postgresql_is_silent_a_put_is_not_stored_and_the_value_before_it_is_not_fresh_again() -> Result<()> {
    let house = House::open(&[("WALCAST_CACHE__MAX_STALENESS", "2s")]).await?;
    ensure!(house.put("ann", "old").await? == "stored");
    house.proxy.pause();
    let told = tokio::time::timeout(DEADLINE, house.put("ann", "new")).await??;
    ensure!(told == "l2_away" || told == "not_hearing", "{told}");
    house.proxy.resume();
    let seen = Reads::service(&house.server).get("/cache/v1/session/ann").await?;
    ensure!(!seen.is_fresh_hit(), "{seen:?}");
    house.put_until_stored("ann", "newest").await?;
    ensure!(house.get("ann").await? == "hit newest");
    // What was on its way in the meantime has no place any more.
    let client = house.postgres.connect().await?;
    let there: Vec<u8> = client.query_one("select value from walcast.cache_entries where key = 'ann'", &[]).await?.get(0);
    ensure!(there == b"newest");
    house.server.stop().await
}

#[tokio::test]
async fn whoever_prefers_not_to_wait_is_answered_202_and_is_told_what_is_wrong_all_the_same() -> Result<()> {
    let house = House::open(&[]).await?;
    let put = |key: &str, text: &str| soon(house.request(Method::PUT, key).body(text.to_owned()));
    let answer = put("ann", "one").send().await?;
    ensure!(answer.status() == 202 && answer.headers()["preference-applied"] == "respond-async", "{answer:?}");
    ensure!(answer.json::<Value>().await? == json!({ "accepted": true }));
    // One that is put later is stored later, whoever waits.
    put("ann", "two").send().await?.error_for_status()?;
    ensure!(house.put("ann", "three").await? == "stored");
    ensure!(house.get("ann").await? == "hit three");
    put("ann", "four").send().await?.error_for_status()?;
    wait::until(DEADLINE, "the last one is stored", async || house.get("ann").await.is_ok_and(|told| told == "hit four")).await?;

    let (status, answer) = house.ask(put("ann", "x").header("cache-control", "max-age=0")).await?;
    ensure!((status, answer["code"].as_str()) == (400, Some("ttl_out_of_range")), "{status}: {answer}");
    let (status, answer) = house.ask(put("ann", "x").header("if-none-match", "*")).await?;
    ensure!((status, answer["code"].as_str()) == (412, Some("precondition_failed")), "{status}: {answer}");

    let batch = json!({ "entries": [{ "key": "m", "value": 1 }, { "key": "n", "value": 1, "ttl": "never" }] });
    let (status, answer) = house.ask(soon(house.request(Method::POST, "mset").json(&batch))).await?;
    ensure!(status == 202 && answer["results"][0] == json!({ "key": "m", "accepted": true }), "{status}: {answer}");
    ensure!(answer["results"][1]["accepted"] == false && answer["results"][1]["reason"] == "bad_entry", "{answer}");
    wait::until(DEADLINE, "the batch is stored", async || house.get("m").await.is_ok_and(|told| told == "hit 1")).await?;
    house.server.stop().await
}

fn soon(request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
    request.header("prefer", "wait=10, respond-async").timeout(Duration::from_secs(60))
}

/// Values of a transaction that nobody has heard of wait for it for some seconds.
#[tokio::test]
async fn p7_where_too_much_waits_already_the_answer_is_the_ordinary_one() -> Result<()> {
    let house = House::open(&[]).await?;
    let url = format!("{}/cache/v1/items/7", house.server.url);
    let token = house.server.token("service_role", None);
    let puts = (0..400).map(|_| {
        let put = soon(house.http.put(&url).bearer_auth(&token).header("walcast-written", "4000000000").body("x"));
        async move { anyhow::Ok(put.send().await?.status().as_u16()) }
    });
    let answers = futures_util::future::try_join_all(puts).await?;
    let of = |status: u16| answers.iter().filter(|answer| **answer == status).count();
    ensure!(of(202) >= 256 && of(200) > 0 && of(200) + of(202) == 400, "{} of 202, {} of 200", of(202), of(200));
    house.server.stop().await
}
