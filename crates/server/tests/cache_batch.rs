//! Many keys in one request, and what a caller can say and learn about what is there: mget, mset, HEAD, If-Match.

mod support;

use anyhow::{Context, Result, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use reqwest::Method;
use serde_json::{Value, json};
use support::{Server, migrate, reads::Reads};
use walcast_testkit::TestPostgres;

const SCHEMA: &str = "create table items (id bigint primary key);
    insert into items select generate_series(1, 20);
    grant select on items to service_role;";

struct House {
    _postgres: TestPostgres,
    server: Server,
    reads: Reads,
    http: reqwest::Client,
}

impl House {
    async fn open() -> Result<House> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, SCHEMA, &[]).await?;
        let server = Server::start(&postgres, &[("WALCAST_CACHE__MAX_VALUE_BYTES", "64KiB")]).await?;
        let reads = Reads::service(&server);
        Ok(House { _postgres: postgres, server, reads, http: reqwest::Client::new() })
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http
            .request(method, format!("{}/cache/v1/{path}", self.server.url))
            .bearer_auth(self.server.token("service_role", None))
    }

    async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> Result<(u16, String)> {
        let answer = self.request(Method::POST, path).body(body).send().await?;
        Ok((answer.status().as_u16(), answer.text().await?))
    }

    async fn mget(&self, keys: &[&str]) -> Result<Vec<Value>> {
        let (status, text) = self.post("n/mget", json!({ "keys": keys }).to_string()).await?;
        ensure!(status == 200, "{status}: {text}");
        let answer: Value = serde_json::from_str(&text)?;
        Ok(answer["entries"].as_array().context("entries")?.clone())
    }

    async fn ticket(&self, key: &str) -> Result<String> {
        Ok(self.mget(&[key]).await?[0]["ticket"].as_str().context("a ticket")?.to_owned())
    }

    /// Each result as `stored` or its reason.
    async fn mset(&self, entries: Value) -> Result<Vec<String>> {
        let (status, text) = self.post("n/mset", json!({ "entries": entries }).to_string()).await?;
        ensure!(status == 200, "{status}: {text}");
        let answer: Value = serde_json::from_str(&text)?;
        let told = |one: &Value| match (&one["stored"], &one["reason"]) {
            (Value::Bool(true), _) => "stored".to_owned(),
            (_, reason) => reason.as_str().unwrap_or_default().to_owned(),
        };
        Ok(answer["results"].as_array().context("results")?.iter().map(told).collect())
    }
}

#[tokio::test]
async fn mget_answers_in_the_order_asked_and_its_tickets_fill_with_mset() -> Result<()> {
    let house = House::open().await?;
    let missed = house.mget(&["a", "b", "a", "bin", "é/ü"]).await?;
    ensure!(missed.iter().all(|entry| entry["status"] == "miss" && entry["ticket"].is_string()), "{missed:?}");
    let ticket = |n: usize| missed[n]["ticket"].clone();
    let raw = r#"{"b": 1.0,  "a": [1e2, "é"]}"#;
    let body = format!(
        r#"{{"entries": [
            {{"key": "a", "value": {raw}, "ticket": {}, "tags": ["items:id=1", "x"], "ttl": 60}},
            {{"key": "bin", "value_base64": "{}", "content_type": "image/png", "ticket": {}, "ttl_ms": 5000}},
            {{"key": "é/ü", "value": null, "ticket": {}}}
        ]}}"#,
        ticket(0),
        BASE64_STANDARD.encode([0, 159, 255]),
        ticket(3),
        ticket(4),
    );
    let (status, text) = house.post("n/mset", body).await?;
    ensure!(status == 200 && text.matches("\"stored\":true").count() == 3, "{status}: {text}");

    let (_, text) = house.post("n/mget", r#"{"keys": ["bin", "a", "none", "é/ü", "a"]}"#).await?;
    ensure!(text.contains(raw), "JSON stands as it was stored: {text}");
    let answer: Value = serde_json::from_str(&text)?;
    let entries = answer["entries"].as_array().context("entries")?;
    let keys: Vec<&str> = entries.iter().filter_map(|entry| entry["key"].as_str()).collect();
    ensure!(keys == ["bin", "a", "none", "é/ü", "a"], "{keys:?}");
    ensure!(entries[0]["value_base64"] == BASE64_STANDARD.encode([0, 159, 255]) && entries[0]["content_type"] == "image/png");
    ensure!(entries[0]["ttl_ms"].as_u64().is_some_and(|ttl| ttl <= 5_000), "{}", entries[0]);
    ensure!(entries[1]["status"] == "hit" && entries[1]["tags"] == json!(["items:id=1", "x"]), "{}", entries[1]);
    ensure!(entries[1]["ticket"].is_null() && entries[1]["age_ms"].is_number());
    ensure!(entries[2]["status"] == "miss" && entries[2].get("value").is_none());
    ensure!(entries[3]["status"] == "hit" && entries[3].get("value").is_some_and(Value::is_null), "null is a value");
    // A key may be called mget: only POST means the batch.
    ensure!(house.reads.fill("/cache/v1/n/mget", "", async || Ok("1".into())).await? == "stored");
    ensure!(house.reads.get("/cache/v1/n/mget").await?.body == "1");
    house.server.stop().await
}

#[tokio::test]
async fn p5_a_commit_between_mget_and_mset_refuses_the_entry_it_touched_and_no_other() -> Result<()> {
    let house = House::open().await?;
    let (one, two) = (house.ticket("1").await?, house.ticket("2").await?);
    house._postgres.execute("delete from items where id = 1").await?;
    house.reads.heard().await?;
    let entry = |id: u32, ticket: &str| json!({ "key": id.to_string(), "value": id, "tags": [format!("items:id={id}")], "ticket": ticket });
    ensure!(house.mset(json!([entry(1, &one), entry(2, &two)])).await? == ["touched", "stored"]);
    house.server.stop().await
}

#[tokio::test]
async fn one_bad_entry_fails_itself_and_bad_batches_are_refused_with_a_code() -> Result<()> {
    let house = House::open().await?;
    let ticket = house.ticket("good").await?;
    let many_tags: Vec<String> = (0..1_000).map(|n| format!("items:unheard_of={n}")).collect();
    let told = house
        .mset(json!([
            { "key": "good", "value": 1, "ticket": ticket },
            { "key": "other", "value": 1, "ticket": ticket },
            { "key": "none", "value": 1 },
            { "key": "forged", "value": 1, "ticket": "x" },
            { "key": "both", "value": 1, "value_base64": "", "ticket": ticket },
            { "key": "neither", "ticket": ticket },
            { "key": "text", "value": 1, "content_type": "text/plain", "ticket": ticket },
            { "key": "b64", "value_base64": "%", "ticket": ticket },
            { "key": "", "value": 1, "ticket": ticket },
            { "key": "tag", "value": 1, "tags": ["~all"], "ticket": ticket },
            { "key": "ttl", "value": 1, "ttl_ms": 1, "ticket": house.ticket("ttl").await? },
            { "key": "large", "value": "x".repeat(70_000), "ticket": house.ticket("large").await? },
            // Counted before the first of them is looked up.
            { "key": "tags", "value": 1, "tags": many_tags, "ticket": house.ticket("tags").await? },
            { "key": "unknown", "value": 1, "colour": "red" },
            { "value": 1 },
            ["key", 1],
            7
        ]))
        .await?;
    let expected = [
        "stored",
        "ticket_other_key",
        "ticket_required",
        "ticket_malformed",
        "bad_entry",
        "bad_entry",
        "bad_entry",
        "bad_entry",
        "bad_key",
        "bad_tag",
        "ttl_out_of_range",
        "value_too_large",
        "too_many_tags",
        "bad_entry",
        "bad_entry",
        "bad_entry",
        "bad_entry",
    ];
    ensure!(told == expected, "{told:?}");

    let many: Vec<String> = (0..257).map(|n| n.to_string()).collect();
    for (path, body, status, code) in [
        ("n/mget", "", 400, "bad_body"),
        ("n/mget", "{\"keys\": 1}", 400, "bad_body"),
        ("n/mget", "[[\"a\"]]", 400, "bad_body"),
        ("n/mget", "{\"keys\": [], \"more\": 1}", 400, "bad_body"),
        ("n/mget", "{\"keys\": []}", 400, "nothing_named"),
        ("n/mget", "{\"keys\": [\"\"]}", 400, "bad_key"),
        ("n/mset", "{\"entries\": []}", 400, "nothing_named"),
        ("n/mset", "{\"entries\": {}}", 400, "bad_body"),
        ("n/mset", "\u{0}", 400, "bad_body"),
        ("a%20b/mget", "{\"keys\": [\"a\"]}", 400, "bad_key"),
        ("n/key", "{}", 405, "method_not_allowed"),
        ("n/mget", &json!({ "keys": many }).to_string(), 400, "too_many_keys"),
        ("n/mset", &" ".repeat((16 << 20) + 1), 413, "batch_too_large"),
    ] {
        let (was, text) = house.post(path, body.to_owned()).await?;
        let answer: Value = serde_json::from_str(&text).context(text.clone())?;
        ensure!(was == status && answer["code"] == code && answer["hint"].is_string(), "{path} {body:.40}: {was} {text}");
    }
    let stranger = house.http.post(format!("{}/cache/v1/n/mget", house.server.url));
    let answer = stranger.bearer_auth(house.server.token("authenticated", None)).body("{\"keys\": [\"good\"]}").send().await?;
    ensure!(answer.status() == 403, "another's namespace");
    house.server.stop().await
}

#[tokio::test]
async fn head_tells_presence_and_ttl_and_gives_no_ticket() -> Result<()> {
    let house = House::open().await?;
    let head = async || house.request(Method::HEAD, "n/k").send().await;
    let miss = head().await?;
    ensure!(miss.status() == 404 && !miss.headers().contains_key("walcast-ticket"));
    ensure!(miss.headers()["cache-status"] == "walcast; fwd=miss; detail=absent");
    ensure!(house.reads.fill("/cache/v1/n/k", "items:id=1", async || Ok("{}".into())).await? == "stored");
    let hit = head().await?;
    let ttl: u64 = hit.headers()["walcast-ttl"].to_str()?.parse()?;
    ensure!(hit.status() == 200 && (1..=300).contains(&ttl) && hit.headers().contains_key("etag"), "{hit:?}");
    ensure!(hit.headers().contains_key("age") && hit.headers()["cache-status"].to_str()?.starts_with("walcast; hit"));
    ensure!(hit.bytes().await?.is_empty());
    house.server.stop().await
}

#[tokio::test]
async fn if_match_replaces_exactly_what_was_read() -> Result<()> {
    let house = House::open().await?;
    let ticket = house.ticket("k").await?;
    let put = async |body: &'static str, header: &str, value: &str| -> Result<(u16, Value)> {
        let request = house.request(Method::PUT, "n/k").header("walcast-ticket", &ticket).header(header, value).body(body);
        let answer = request.send().await?;
        Ok((answer.status().as_u16(), answer.json().await?))
    };
    let etag = async || -> Result<String> {
        let answer = house.request(Method::GET, "n/k").send().await?;
        Ok(answer.headers()["etag"].to_str()?.to_owned())
    };
    let (status, answer) = put("0", "if-match", "\"none\"").await?;
    ensure!(status == 412 && answer["code"] == "precondition_failed" && answer["hint"].is_string(), "{answer}");
    ensure!(put("0", "if-match", "*").await?.0 == 412);
    ensure!(put("1", "if-none-match", "*").await?.0 == 200);
    ensure!(put("2", "if-none-match", "*").await?.0 == 412);
    let first = etag().await?;
    ensure!(put("2", "if-match", &format!("\"x\", {first}")).await?.0 == 200);
    ensure!(put("3", "if-match", &first).await?.0 == 412, "it was replaced meanwhile");
    ensure!(house.reads.get("/cache/v1/n/k").await?.body == "2");
    for (header, value) in [("if-match", "bare"), ("if-match", "W/\"weak\""), ("if-none-match", "\"x\"")] {
        let (status, answer) = put("4", header, value).await?;
        ensure!(status == 400 && answer["code"] == "bad_precondition", "{header}: {value}: {answer}");
    }
    // Of many who replace the same entry one does.
    let now = etag().await?;
    let tries = (0..8).map(|n| {
        let request = house.request(Method::PUT, "n/k").header("walcast-ticket", &ticket).header("if-match", &now);
        tokio::spawn(request.body(format!("try {n}")).send())
    });
    let mut won = 0;
    for one in tries.collect::<Vec<_>>() {
        won += usize::from(one.await??.status() == 200);
    }
    ensure!(won == 1, "{won} of them replaced it");
    house.server.stop().await
}
