//! What bad input gets: a status, a `code`, a `hint` and one clear sentence; a program that lives on; and never a secret.

mod support;

use anyhow::{Context, Result, ensure};
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use support::{DEADLINE, SECRET, Server, migrate};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use walcast_testkit::{TestPostgres, jwt};

const SCHEMA: &str = "
create table notes (id bigint primary key, body text);
grant select on notes to authenticated, service_role;
create table unheard (id bigint primary key);
grant select on unheard to authenticated, service_role;
create table closed (id bigint primary key);
revoke all on closed from public;";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["notes", "closed"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

/// Sends it, and holds the answer to status, code, a hint, and the form of a problem document.
async fn refused(what: &str, request: RequestBuilder, status: u16, code: &str) -> Result<Value> {
    let answer = request.send().await.with_context(|| what.to_owned())?;
    let got = answer.status().as_u16();
    let kind = answer.headers().get("content-type").and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned();
    let text = answer.text().await?;
    ensure!(got == status, "{what}: {got} instead of {status}: {text}");
    ensure!(kind == "application/problem+json", "{what}: content type `{kind}`: {text}");
    let problem: Value = serde_json::from_str(&text).with_context(|| format!("{what}: {text}"))?;
    ensure!(problem["code"] == code && problem["status"] == status, "{what}: {problem}");
    for part in ["title", "hint"] {
        ensure!(
            problem[part].as_str().is_some_and(|text| text.len() > 5 && !text.contains('\n')),
            "{what}: no {part}: {problem}"
        );
    }
    ensure!(!text.contains(SECRET), "{what}: the secret is in the answer");
    Ok(problem)
}

#[tokio::test]
async fn a_wrong_token_is_refused_with_the_reason() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let http = Client::new();
    let paths = ["/cache/v1/n/k", "/sse/v1/changes?table=notes", "/query/v1/q"];
    let forged = jwt("another secret, of the same length and more", "service_role", None, 3600, json!({}));
    let unsigned = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJyb2xlIjoic2VydmljZV9yb2xlIiwiZXhwIjo5OTk5OTk5OTk5fQ.";
    for path in paths {
        let get = |token: &str| http.get(format!("{}{path}", server.url)).bearer_auth(token);
        let none = refused("no token", http.get(format!("{}{path}", server.url)), 401, "MalformedJWT").await?;
        assert!(none["hint"].as_str().unwrap_or_default().contains("Authorization: Bearer"), "{none}");
        refused("garbage", get("garbage"), 401, "MalformedJWT").await?;
        refused("three parts of garbage", get("a.b.c"), 401, "MalformedJWT").await?;
        refused("forged", get(&forged), 401, "JwtSignatureError").await?;
        let expired = refused("expired", get(&jwt(SECRET, "anon", None, -60, json!({}))), 401, "InvalidJWTToken").await?;
        assert!(expired["title"].as_str().unwrap_or_default().contains("expired"), "{expired}");
        refused("no role", get(&jwt(SECRET, "x", None, 60, json!({ "role": null }))), 401, "InvalidJWTToken").await?;
        refused("no exp", get(&jwt(SECRET, "anon", None, 60, json!({ "exp": null }))), 401, "InvalidJWTToken").await?;
        refused("not yet", get(&jwt(SECRET, "anon", None, 600, json!({ "nbf": 9_999_999_999_u64 }))), 401, "InvalidJWTToken")
            .await?;
        for role in ["postgres", "walcast", "no_such_role", "authenticated\"; drop table notes; --"] {
            refused(role, get(&jwt(SECRET, role, None, 60, json!({}))), 403, "InvalidJWTToken").await?;
        }
        let got = get(unsigned).send().await?.status();
        assert_eq!(got, 401, "an unsigned token");
        let long = http.get(format!("{}{path}", server.url)).header("authorization", "Basic eDp5").send().await?;
        assert_eq!(long.status(), 401, "another scheme");
    }
    server.stop().await
}

#[tokio::test]
async fn a_strict_cache_refuses_unknown_namespaces_and_callers_who_may_not() -> Result<()> {
    let (_postgres, server) = serving(&[("WALCAST_CACHE__STRICT", "true")]).await?;
    let http = Client::new();
    let service = server.token("service_role", None);
    let url = format!("{}/cache/v1/invented/k", server.url);
    for method in [Method::GET, Method::PUT, Method::DELETE] {
        let problem =
            refused("strict", http.request(method, &url).bearer_auth(&service).body("x"), 404, "unknown_namespace").await?;
        assert!(problem["hint"].as_str().unwrap_or_default().contains("[cache.namespaces.invented]"), "{problem}");
    }
    server.stop().await?;

    let (_postgres, server) = serving(&[]).await?;
    let user = server.token("authenticated", None);
    let url = format!("{}/cache/v1/n/k", server.url);
    refused("a user's token", http.get(&url).bearer_auth(&user), 403, "role_not_allowed").await?;
    let body = json!({ "tags": ["notes"] });
    refused(
        "a user invalidates",
        http.post(format!("{}/cache/v1/invalidate", server.url)).bearer_auth(&user).json(&body),
        403,
        "role_not_allowed",
    )
    .await?;
    server.stop().await
}

#[tokio::test]
async fn keys_headers_and_bodies_that_cannot_be_are_refused_one_by_one() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let http = Client::new();
    let service = server.token("service_role", None);
    let at = |path: &str| format!("{}/cache/v1/{path}", server.url);
    let long = "k".repeat(513);
    let wide = "n".repeat(65);
    for (what, path) in [
        ("a key that is too long", format!("n/{long}")),
        ("a control character", "n/a%0Ab".into()),
        ("a zero byte", "n/a%00".into()),
        ("a namespace with a space", "n%20m/k".into()),
        ("a namespace that is too long", format!("{wide}/k")),
        ("a namespace with a slash", "n%2Fm/k".into()),
        ("not UTF-8", "n/%FF%FE".into()),
    ] {
        for method in [Method::GET, Method::PUT, Method::DELETE] {
            refused(what, http.request(method.clone(), at(&path)).bearer_auth(&service).body("x"), 400, "bad_key").await?;
        }
    }
    // Odd, but keys: read back under their own name and no other.
    for odd in ["%C3%A9", "a%2Fb", "%25", "a%20b", "%2E%2E%2Fsecret", "100%25%3F"] {
        let found = http.get(at(&format!("n/{odd}"))).bearer_auth(&service).send().await?;
        assert_eq!((found.status(), found.headers().contains_key("walcast-ticket")), (StatusCode::NOT_FOUND, true), "{odd}");
    }
    for path in ["n/", "n/a/b"] {
        let found = http.get(at(path)).bearer_auth(&service).send().await?;
        assert!(found.status().is_client_error(), "{path}: {}", found.status());
    }

    let ticket = async || -> Result<String> {
        let miss = http.get(at("n/k")).bearer_auth(&service).send().await?;
        Ok(miss.headers()["walcast-ticket"].to_str()?.to_owned())
    };
    let put = |ticket: &str| http.put(at("n/k")).bearer_auth(&service).header("walcast-ticket", ticket).body("x");
    refused("no ticket", http.put(at("n/k")).bearer_auth(&service).body("x"), 428, "ticket_required").await?;
    let good = ticket().await?;
    for bad in ["nonsense", "", &good[..good.len() - 2], &format!("{good}AA")] {
        let answer = put(bad).send().await?;
        let (status, text) = (answer.status(), answer.text().await?);
        ensure!(status.is_client_error() || text.contains(r#""stored":false"#), "ticket `{bad}`: {status} {text}");
    }
    // A ticket of one key does not store another.
    let other = http.put(at("n/other")).bearer_auth(&service).header("walcast-ticket", &good).body("x").send().await?;
    let (status, text) = (other.status(), other.text().await?);
    ensure!(status.is_client_error() || text.contains(r#""stored":false"#), "{status} {text}");

    refused("a max-age of words", put(&good).header("cache-control", "max-age=soon"), 400, "bad_max_age").await?;
    refused("a negative max-age", put(&good).header("cache-control", "max-age=-1"), 400, "bad_max_age").await?;
    for control in ["max-age", "max-age=+5", "no-store, Max-Age=0.5", "max-age=5, max-age=6"] {
        refused(control, put(&good).header("cache-control", control), 400, "bad_max_age").await?;
    }
    // In any case of letters, and above 30 days: not read past.
    refused("another case", put(&good).header("cache-control", "Max-Age=2592001"), 400, "ttl_out_of_range").await?;
    refused("a bad transaction beside a ticket", put(&good).header("walcast-written", "x"), 400, "bad_transaction_id").await?;
    refused("an ETag with a space", put(&good).header("if-match", "\"a b\""), 400, "bad_precondition").await?;
    let both = put(&good).header("if-match", "*").header("if-none-match", "*");
    refused("something is there and nothing is", both, 412, "precondition_failed").await?;
    let post = http.post(at("n/k")).bearer_auth(&service).send().await?;
    ensure!(post.status() == 405 && post.headers()["allow"] == "GET, HEAD, PUT, DELETE", "{post:?}");
    refused("a tag with a control character", put(&good).header("cache-tag", "a\tb"), 400, "bad_tag").await?;
    refused("an endless tag", put(&good).header("cache-tag", "t".repeat(5000)), 400, "bad_tag").await?;
    // Taken for none, the value would be kept without its tags, and the read answered without its freshness.
    let bytes = || reqwest::header::HeaderValue::from_bytes(b"notes:id=\xc3\xa9").unwrap();
    for name in ["cache-tag", "cache-control", "walcast-written", "content-type"] {
        refused(name, put(&good).header(name, bytes()), 400, "bad_header").await?;
    }
    refused("a second line of tags", put(&good).header("cache-tag", "notes").header("cache-tag", bytes()), 400, "bad_header")
        .await?;
    let get = |value| http.get(at("n/k")).bearer_auth(&service).header("walcast-at-least", value);
    refused("a freshness that cannot be read", get(bytes()), 400, "bad_position").await?;
    refused("transaction 0", get(reqwest::header::HeaderValue::from_static("0")), 400, "bad_position").await?;
    refused("a tag of a column that is not there", put(&good).header("cache-tag", "notes:nothing=1"), 422, "untracked_tag")
        .await?;
    refused(
        "a transaction id of words",
        http.put(at("n/k")).bearer_auth(&service).header("walcast-written", "yesterday").body("x"),
        400,
        "bad_transaction_id",
    )
    .await?;
    refused(
        "a position of words",
        http.get(at("n/k")).bearer_auth(&service).header("walcast-at-least", "later"),
        400,
        "bad_position",
    )
    .await?;
    // Conditions that match nothing are no error.
    let miss = http.get(at("n/k")).bearer_auth(&service).header("if-none-match", "W/\"what\", , \"").send().await?;
    assert_eq!(miss.status(), 404);

    let invalidate = |body: &'static str| http.post(at("invalidate")).bearer_auth(&service).body(body);
    for (body, code) in [
        ("{", "bad_body"),
        ("", "bad_body"),
        ("[]", "bad_body"),
        ("[\"n\", [\"k\"]]", "bad_body"),
        ("{\"tag\": [\"x\"]}", "bad_body"),
        ("{\"tags\": \"x\"}", "bad_body"),
        ("{\"tags\": [\"x\"], \"namespace\": null}", "bad_body"),
        ("{\"tags\": [\"x\"], \"keys\": null}", "bad_body"),
        ("{\"tags\": null}", "bad_body"),
        ("{}", "nothing_named"),
        ("{\"keys\": [\"k\"]}", "namespace_required"),
        ("{\"namespace\": \"a b\"}", "bad_namespace"),
        ("{\"namespace\": \"n\", \"keys\": [\"\"]}", "bad_key"),
        ("{\"tags\": [\"\"]}", "bad_tag"),
    ] {
        refused(body, invalidate(body), 400, code).await?;
    }
    refused(
        "a GET of invalidate's neighbour",
        http.get(format!("{}/query/v1/nothing", server.url)).bearer_auth(&service),
        404,
        "unknown_query",
    )
    .await?;
    refused(
        "a body that is no JSON",
        http.post(format!("{}/query/v1/nothing", server.url)).bearer_auth(&service).body("{\"a\":"),
        400,
        "bad_body",
    )
    .await?;
    server.stop().await
}

/// By hand: whether the connection lives on is the question.
#[tokio::test]
async fn a_value_of_ten_megabytes_is_refused_and_the_connection_stays_usable() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let service = server.token("service_role", None);
    let address = server.url.trim_start_matches("http://").to_owned();
    let mut socket = TcpStream::connect(&address).await?;
    let size = 10 << 20;
    let head = format!(
        "PUT /cache/v1/n/big HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {service}\r\ncontent-length: {size}\r\n\r\n"
    );
    let next = format!("GET /cache/v1/n/small HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {service}\r\n\r\n");
    socket.write_all(head.as_bytes()).await?;
    let (mut reader, mut writer) = socket.split();
    let sending = async {
        let block = vec![b'x'; 1 << 16];
        for _ in 0..size / block.len() {
            writer.write_all(&block).await?;
        }
        writer.write_all(next.as_bytes()).await?;
        anyhow::Ok(())
    };
    let reading = async {
        let (mut text, mut buffer) = (String::new(), vec![0; 1 << 16]);
        while text.matches("HTTP/1.1 ").count() < 2 || !text.contains("\"code\":\"miss\"") {
            let read = reader.read(&mut buffer).await?;
            ensure!(read > 0, "the connection was closed after: {text}");
            text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
        Ok(text)
    };
    let (sent, text) =
        tokio::time::timeout(DEADLINE, async { tokio::join!(sending, reading) }).await.context("no two answers")?;
    let text = text?;
    sent?;
    assert!(
        text.starts_with("HTTP/1.1 413") && text.contains("value_too_large") && text.contains("cache.max_value_bytes"),
        "{text}"
    );
    assert!(text.contains("HTTP/1.1 404"), "{text}");

    // Without a length it is counted as it comes.
    let stream = futures_util::stream::iter((0..160).map(|_| Ok::<_, std::io::Error>(vec![b'y'; 1 << 16])));
    let chunked = Client::new()
        .put(format!("{}/cache/v1/n/big", server.url))
        .bearer_auth(&service)
        .body(reqwest::Body::wrap_stream(stream));
    match chunked.send().await {
        Ok(answer) => assert_eq!(answer.status(), 413),
        // The answer may come while we still write.
        Err(error) => assert!(error.is_request() || error.is_body(), "{error:?}"),
    }
    assert_eq!(reqwest::get(format!("{}/healthz", server.url)).await?.status(), 200);
    server.stop().await
}

#[tokio::test]
async fn a_subscription_that_cannot_be_says_why() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let http = Client::new();
    let user = server.token("authenticated", None);
    for (query, code, word) in [
        ("", "no_table", "table"),
        ("table=notes&filter=absent=eq.1", "bad_subscription", "no column `absent`"),
        ("table=notes&filter=id=eq.one", "bad_subscription", "column `id`"),
        ("table=notes&filter=id=almost.1", "bad_subscription", "operator `almost`"),
        ("table=notes&filter=id", "bad_subscription", "column=operator.value"),
        ("table=unheard", "bad_subscription", "alter publication supabase_realtime add table"),
        ("table=closed", "bad_subscription", "may not select"),
        ("table=no_such", "bad_subscription", "no such table"),
        ("table=notes%3B%20drop%20table%20notes", "bad_subscription", "no such table"),
        ("table=notes&event=TRUNCATED", "unknown_event", "TRUNCATED"),
        ("tabel=notes", "unknown_parameter", "tabel"),
        ("table=notes&last_event_id=yesterday", "bad_position", "position"),
    ] {
        let problem =
            refused(query, http.get(format!("{}/sse/v1/changes?{query}", server.url)).bearer_auth(&user), 400, code).await?;
        let said = format!("{} {}", problem["title"], problem["hint"]);
        ensure!(said.contains(word), "{query}: `{word}` is not in {said}");
    }
    // The table is still there, and heard.
    let answer = http.get(format!("{}/sse/v1/changes?table=notes", server.url)).bearer_auth(&user).send().await?;
    assert_eq!(answer.status(), 200);
    drop(answer);
    server.stop().await
}

#[tokio::test]
async fn supabases_other_services_and_unknown_paths_say_where_to_go() -> Result<()> {
    let (_postgres, server) = serving(&[]).await?;
    let http = Client::new();
    for path in ["/rest/v1", "/rest/v1/notes?select=*", "/auth/v1/token", "/storage/v1/object/x"] {
        for method in [Method::GET, Method::POST] {
            let problem = refused(path, http.request(method, format!("{}{path}", server.url)), 404, "not_served_here").await?;
            assert!(problem["hint"].as_str().unwrap_or_default().contains("Supabase"), "{problem}");
        }
    }
    let problem = refused("nothing", http.get(format!("{}/no/such/path", server.url)), 404, "no_such_path").await?;
    assert!(problem["title"].as_str().unwrap_or_default().contains("/no/such/path"), "{problem}");
    // Only `walcast dev` has keys to give away.
    refused("the demo", http.get(format!("{}/demo/session.json", server.url)), 404, "no_such_path").await?;
    server.stop().await
}
