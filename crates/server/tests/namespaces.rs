//! Who may do what in a namespace, whose entry is whose, and what a key, a life and a list of tags may be, at the HTTP door.

mod support;

use anyhow::{Result, ensure};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde_json::{Value, json};
use support::{SECRET, Server, migrate};
use walcast_testkit::{TestPostgres, jwt};

const CONFIG: &str = r#"
[cache.namespaces.sessions]
source = "external"
per_context = true
read = ["authenticated"]
write = ["authenticated"]
invalidate = ["claim:app_role=admin"]

[cache.namespaces.teams]
source = "external"
per_context = true
context = ["app_metadata.team"]
read = ["authenticated"]
write = ["authenticated"]

[cache.namespaces.notices]
source = "external"
read = ["authenticated", "anon"]
write = ["claim:app_metadata.permissions=cache.write"]

[cache.namespaces.swept]
source = "external"
read = ["claim:app_role=admin"]
invalidate = ["claim:app_role=admin", "claim:app_role=janitor"]

[cache.namespaces.counted]
tags = ["notes"]
"#;

struct Door {
    _postgres: TestPostgres,
    server: Server,
    http: Client,
}

impl Door {
    async fn open() -> Result<Door> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, "create table notes (id bigint primary key, body text)", &[]).await?;
        let server = Server::configured(&postgres, CONFIG, &[]).await?;
        Ok(Door { _postgres: postgres, server, http: Client::new() })
    }

    fn ask(&self, method: Method, path: &str, token: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.server.url)).bearer_auth(token)
    }

    async fn get(&self, path: &str, token: &str) -> Result<(u16, String)> {
        let answer = self.ask(Method::GET, path, token).send().await?;
        Ok((answer.status().as_u16(), answer.text().await?))
    }

    async fn put(&self, path: &str, token: &str, value: &str) -> Result<(u16, Value)> {
        parts(self.ask(Method::PUT, path, token).body(value.to_owned()).send().await?).await
    }
}

async fn parts(answer: Response) -> Result<(u16, Value)> {
    let status = answer.status().as_u16();
    Ok((status, answer.json().await?))
}

fn user(subject: &str, claims: Value) -> String {
    jwt(SECRET, "authenticated", Some(subject), 3600, claims)
}

fn stored() -> (u16, Value) {
    (200, json!({ "stored": true }))
}

#[tokio::test]
async fn p3_reading_writing_and_invalidating_are_rights_of_their_own() -> Result<()> {
    let door = Door::open().await?;
    let (ann, anon) = (user("ann", json!({})), jwt(SECRET, "anon", None, 3600, json!({})));
    let editor = user("eve", json!({ "app_metadata": { "permissions": ["rooms", "cache.write"] } }));
    let service = door.server.token("service_role", None);

    let (status, problem) = door.put("/cache/v1/notices/a", &ann, "x").await?;
    assert_eq!((status, &problem["code"]), (403, &json!("role_not_allowed")));
    assert_eq!(problem["title"], "role `authenticated` has no right to write in namespace `notices`");
    let hint = problem["hint"].as_str().unwrap_or_default();
    assert!(hint.contains("[cache.namespaces.notices]: write = [\"authenticated\"]"), "{hint}");

    assert_eq!(door.put("/cache/v1/notices/a", &editor, "hello").await?, stored());
    assert_eq!(door.get("/cache/v1/notices/a", &ann).await?, (200, "hello".into()));
    assert_eq!(door.get("/cache/v1/notices/a", &anon).await?, (200, "hello".into()));
    // A claim grants what it says, and reading was granted to roles: the editor has the role too.
    assert_eq!(door.get("/cache/v1/notices/a", &editor).await?.0, 200);
    for token in [&ann, &editor, &anon] {
        let (status, problem) = parts(door.ask(Method::DELETE, "/cache/v1/notices/a", token).send().await?).await?;
        assert_eq!(status, 403, "{problem}");
        assert!(problem["title"].as_str().unwrap_or_default().contains("no right to invalidate"), "{problem}");
        let by_hand = door.ask(Method::POST, "/cache/v1/invalidate", token).json(&json!({ "namespace": "notices" }));
        assert_eq!(by_hand.send().await?.status(), 403);
    }
    assert_eq!(door.ask(Method::DELETE, "/cache/v1/notices/a", &service).send().await?.status(), 200);
    assert_eq!(door.get("/cache/v1/notices/a", &ann).await?.0, 404);

    // Not named in the config: service_role's alone.
    assert_eq!(door.get("/cache/v1/unnamed/a", &ann).await?.0, 403);
    assert_eq!(door.get("/cache/v1/unnamed/a", &service).await?.0, 404);
    // What queries keep is nobody's by key.
    assert_eq!(door.get("/cache/v1/query.ward/a", &service).await?.0, 403);
    door.server.stop().await
}

#[tokio::test]
async fn p3_a_context_never_reads_anothers_and_a_key_is_dropped_for_all_of_them() -> Result<()> {
    let door = Door::open().await?;
    let (ann, bob) = (user("ann", json!({})), user("bob", json!({})));
    let admin = user("ann", json!({ "app_role": "admin" }));
    let service = door.server.token("service_role", None);
    let path = "/cache/v1/sessions/cart";
    for (token, value) in [(&ann, "ann's"), (&bob, "bob's"), (&admin, "admin's"), (&service, "the service's")] {
        assert_eq!(door.get(path, token).await?.0, 404, "{value} before it was put");
        assert_eq!(door.put(path, token, value).await?, stored());
    }
    for (token, value) in [(&ann, "ann's"), (&bob, "bob's"), (&admin, "admin's"), (&service, "the service's")] {
        assert_eq!(door.get(path, token).await?, (200, value.into()));
    }
    // A renewed token is the same asker.
    let renewed = jwt(SECRET, "authenticated", Some("ann"), 7200, json!({ "jti": "another" }));
    assert_eq!(door.get(path, &renewed).await?.1, "ann's");
    // Nobody can spell another's key: the separator is refused.
    assert_eq!(door.get("/cache/v1/sessions/cart%1F00000000000000000000000000000000", &bob).await?.0, 400);

    let long = format!("/cache/v1/sessions/{}", "k".repeat(512));
    assert_eq!(door.put(&long, &ann, "long").await?, stored());
    assert_eq!(door.get(&long, &ann).await?, (200, "long".into()));
    assert_eq!(door.get(&long, &bob).await?.0, 404);

    assert_eq!(door.ask(Method::DELETE, path, &ann).send().await?.status(), 403);
    assert_eq!(door.ask(Method::DELETE, path, &admin).send().await?.status(), 200);
    for token in [&ann, &bob, &admin, &service] {
        assert_eq!(door.get(path, token).await?.0, 404, "dropped by one, gone for all");
    }
    assert_eq!(door.get(&long, &ann).await?.0, 200, "another key stays");

    for token in [&ann, &bob] {
        assert_eq!(door.put(path, token, "again").await?, stored());
    }
    let by_key = json!({ "namespace": "sessions", "keys": ["cart"] });
    assert_eq!(door.ask(Method::POST, "/cache/v1/invalidate", &service).json(&by_key).send().await?.status(), 200);
    for token in [&ann, &bob] {
        assert_eq!(door.get(path, token).await?.0, 404);
    }

    // Only the claim that matters tells them apart.
    let of = |subject: &str, team: &str| user(subject, json!({ "app_metadata": { "team": team } }));
    assert_eq!(door.put("/cache/v1/teams/board", &of("ann", "red"), "red board").await?, stored());
    assert_eq!(door.get("/cache/v1/teams/board", &of("bob", "red")).await?, (200, "red board".into()));
    assert_eq!(door.get("/cache/v1/teams/board", &of("ann", "blue")).await?.0, 404);
    assert_eq!(door.get("/cache/v1/teams/board", &ann).await?.0, 404, "no team is a team of its own");
    door.server.stop().await
}

/// In healthcare a key is data.
#[tokio::test]
async fn p3_a_dry_run_names_keys_only_to_those_who_may_read_them() -> Result<()> {
    let door = Door::open().await?;
    let (editor, ann) = (user("eve", json!({ "app_metadata": { "permissions": ["cache.write"] } })), user("ann", json!({})));
    let (admin, janitor) = (user("bob", json!({ "app_role": "admin" })), user("joe", json!({ "app_role": "janitor" })));
    let service = door.server.token("service_role", None);
    for (path, token) in
        [("/cache/v1/sessions/hiv-test", &ann), ("/cache/v1/notices/ward-3", &editor), ("/cache/v1/swept/ward-3", &service)]
    {
        assert_eq!(door.put(path, token, "x").await?, stored());
    }
    for (namespace, who, token, sample) in [
        ("sessions", "another context's admin", &admin, None),
        ("sessions", "the service", &service, Some("sessions/hiv-test")),
        ("swept", "one who may only invalidate", &janitor, None),
        ("swept", "one who may read", &admin, Some("swept/ward-3")),
    ] {
        let asked = json!({ "namespace": namespace, "pattern": "*", "dry_run": true });
        let (status, told) = parts(door.ask(Method::POST, "/cache/v1/invalidate", token).json(&asked).send().await?).await?;
        assert_eq!((status, &told["invalidated"]), (200, &json!(1)), "{who}: {told}");
        let expected = sample.map_or(Value::Null, |key| json!([key]));
        assert_eq!(told["sample"], expected, "{who} in {namespace}: {told}");
    }
    door.server.stop().await
}

#[tokio::test]
async fn a_ticket_of_one_context_is_no_ticket_of_another() -> Result<()> {
    let door = Door::open().await?;
    let (ann, bob) = (user("ann", json!({})), user("bob", json!({})));
    let miss = door.ask(Method::GET, "/cache/v1/sessions/x", &ann).send().await?;
    let ticket = miss.headers()["walcast-ticket"].to_str()?.to_owned();
    let put = |token: &str| {
        let request = door.ask(Method::PUT, "/cache/v1/sessions/x", token).header("walcast-ticket", ticket.clone()).body("v");
        async move { parts(request.send().await?).await }
    };
    assert_eq!(put(&bob).await?, (200, json!({ "stored": false, "reason": "ticket_other_key" })));
    assert_eq!(put(&ann).await?, stored());
    door.server.stop().await
}

#[tokio::test]
async fn keys_lives_and_tags_have_bounds() -> Result<()> {
    let door = Door::open().await?;
    let service = door.server.token("service_role", None);
    let refused = async |request: RequestBuilder, status: u16, code: &str| {
        let (got, problem) = parts(request.send().await?).await?;
        ensure!((got, problem["code"].as_str()) == (status, Some(code)), "{got} {problem}");
        ensure!(problem["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{problem}");
        Ok(())
    };
    let put = |path: &str| door.ask(Method::PUT, path, &service).body("v");
    let key = |n: usize| format!("/cache/v1/notices/{}", "%C3%A9".repeat(n));
    assert_eq!(parts(put(&key(512)).send().await?).await?, stored());
    refused(put(&key(513)), 400, "bad_key").await?;
    for unprintable in ["a%00b", "a%0Ab", "%7F", "a%C2%85", "%E2%80%A8", "%FF"] {
        refused(put(&format!("/cache/v1/notices/{unprintable}")), 400, "bad_key").await?;
    }
    refused(put("/cache/v1/no%20tices/k"), 400, "bad_key").await?;

    for (age, good) in [(1, true), (2_592_000, true), (0, false), (2_592_001, false)] {
        let request = put("/cache/v1/notices/ttl").header("cache-control", format!("max-age={age}"));
        match good {
            true => assert_eq!(parts(request.send().await?).await?, stored(), "max-age={age}"),
            false => refused(request, 400, "ttl_out_of_range").await?,
        }
    }
    let tags = |n: usize| (0..n).map(|n| format!("tag:{n}")).collect::<Vec<_>>().join(", ");
    assert_eq!(parts(put("/cache/v1/notices/tags").header("cache-tag", tags(64)).send().await?).await?, stored());
    refused(put("/cache/v1/notices/tags").header("cache-tag", tags(65)), 400, "too_many_tags").await?;
    door.server.stop().await
}
