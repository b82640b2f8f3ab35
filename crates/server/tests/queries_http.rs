//! Named queries over HTTP: what the headers promise, pages, batches, and what one tenant's write leaves alone.

mod support;

use std::collections::HashSet;

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use support::{
    DEADLINE, SECRET, Server, migrate,
    queries::{QueryDir, get, post},
    reads::Reads,
};
use walcast_engine::model::{CacheKey, Floor, Tag, TagClock, TagHash};
use walcast_testkit::{TestPostgres, wait};

const SCHEMA: &str = "
create table prices (id bigint primary key, price int not null);
create table notes (id bigint generated always as identity primary key, tenant_id bigint not null, body text not null,
                    at timestamptz not null default '2026-01-01');
create index on notes (tenant_id, at desc, id desc);
create table orders (id bigint primary key, tenant_id bigint not null, total int not null);
create index on orders (tenant_id);
alter table notes replica identity full;
alter table orders replica identity full;
alter table orders enable row level security;
create policy own on orders for select to authenticated using (tenant_id = (auth.jwt() ->> 'tenant')::bigint);
grant select on prices to anon, authenticated, service_role;
grant select on notes, orders to authenticated, service_role;
insert into prices select n, n * 10 from generate_series(1, 5) n;
insert into notes (tenant_id, body) select n % 1000 + 1, 'note ' || n from generate_series(1, 3000) n;
insert into orders select n, n % 1000 + 1, n from generate_series(1, 2000) n;";

async fn clinic(files: &[(&str, &str)], settings: &[(&str, &str)]) -> Result<(TestPostgres, QueryDir, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &[]).await?;
    let dir = QueryDir::new(files)?;
    let folder = dir.setting();
    let mut all = vec![("WALCAST_QUERIES__DIR", folder.as_str())];
    all.extend(settings);
    let server = Server::start(&postgres, &all).await?;
    Ok((postgres, dir, server))
}

#[tokio::test]
async fn a_page_of_another_origin_is_told_beforehand_that_it_may_send_its_token() -> Result<()> {
    let (_postgres, _dir, server) = clinic(&[], &[]).await?;
    for (method, path) in
        [("GET", "/query/v1/prices"), ("POST", "/query/v1"), ("PUT", "/cache/v1/n/k"), ("GET", "/sse/v1/changes")]
    {
        let preflight = reqwest::Client::new()
            .request(reqwest::Method::OPTIONS, format!("{}{path}", server.url))
            .header("origin", "https://app.example")
            .header("access-control-request-method", method)
            .header("access-control-request-headers", "authorization,walcast-at-least");
        let answer = preflight.send().await?;
        let allowed = answer.headers().get("access-control-allow-headers").context("no headers allowed")?.to_str()?;
        ensure!(answer.status() == 200 && allowed.contains("authorization"), "{path}: {} {allowed}", answer.status());
        ensure!(answer.headers()["access-control-allow-origin"] == "*", "{path}");
    }
    server.stop().await
}

/// A plan's narrowing is trusted once all that it may have missed has settled.
async fn warm(server: &Server, tokens: &[&str], path: &str) -> Result<()> {
    for token in tokens {
        get(server, token, path, &[]).await?;
    }
    Reads::service(server).settled().await
}

#[tokio::test]
async fn only_an_answer_for_everybody_is_public_and_nothing_is_reused_that_its_author_did_not_allow() -> Result<()> {
    let files = [
        ("prices", "-- s_maxage: 1m\n-- client_max_age: 5s\nselect * from prices order by id"),
        ("mine", "-- s_maxage: 1m\nselect id, auth.uid() as me from prices"),
        ("orders", "-- s_maxage: 1m\nselect id from orders where id < 10"),
        ("plain", "select * from prices order by id"),
    ];
    let (_postgres, _dir, server) = clinic(&files, &[]).await?;
    let (anon, user) = (server.token("anon", None), server.token("authenticated", None));
    for (token, query, expected) in [
        (&anon, "prices", "public, max-age=5, s-maxage=60"),
        (&user, "prices", "private, max-age=5"),
        (&anon, "plain", "private, no-cache"),
        (&anon, "mine", "private, no-cache"),
        (&user, "orders", "private, no-cache"),
    ] {
        let answer = get(&server, token, &format!("/query/v1/{query}"), &[]).await?;
        ensure!(answer.header("cache-control") == expected, "{query}: {}", answer.header("cache-control"));
        ensure!(answer.header("vary").contains("authorization") && answer.header("vary").contains("accept"), "{query}");
    }
    let answer = get(&server, &anon, "/query/v1/plain", &[]).await?;
    let etag = answer.header("etag").to_owned();
    ensure!(answer.header("cache-status").starts_with("walcast; hit"), "{}", answer.header("cache-status"));
    for (list, status) in [
        (etag.clone(), 304),
        (format!("W/{etag}"), 304),
        (format!("\"x,y\", W/{etag} , \"z\""), 304),
        ("*".into(), 304),
        ("\"x\"".into(), 200),
        (etag.trim_matches('"').to_owned(), 200),
    ] {
        let answer = get(&server, &anon, "/query/v1/plain", &[("if-none-match", &list)]).await?;
        ensure!(answer.status == status && answer.header("etag") == etag, "{list}: {}", answer.status);
        ensure!((status == 304) == answer.body.is_empty(), "{list}: {}", answer.body);
    }
    server.stop().await
}

#[tokio::test]
async fn pages_are_followed_by_their_links_and_each_is_kept_until_its_own_tenant_writes() -> Result<()> {
    let files = [(
        "notes",
        "-- param: tenant bigint\n-- page: 2 by at desc, id desc\nselect id, body, at from notes where tenant_id = $1",
    )];
    let (postgres, _dir, server) = clinic(&files, &[]).await?;
    let service = server.token("service_role", None);
    warm(&server, &[&service], "/query/v1/notes?tenant=9").await?;
    let mut seen = Vec::new();
    let mut path = "/query/v1/notes?tenant=7".to_owned();
    let mut paths = Vec::new();
    loop {
        let answer = get(&server, &service, &path, &[]).await?;
        ensure!(answer.status == 200, "{}", answer.body);
        seen.extend(answer.json()?.as_array().cloned().unwrap_or_default());
        paths.push(std::mem::take(&mut path));
        let (link, next) = (answer.header("link"), answer.header("walcast-next"));
        ensure!(link.is_empty() == next.is_empty(), "{link} {next}");
        match link.strip_prefix('<').and_then(|link| link.split_once(">; rel=\"next\"")) {
            Some((next, _)) => path = next.to_owned(),
            None => break,
        }
    }
    let ids: Vec<i64> = seen.iter().filter_map(|row| row["id"].as_i64()).collect();
    ensure!(ids == [2006, 1006, 6] && paths.len() == 2, "{ids:?} {paths:?}");
    let kept = async |path: &str| {
        anyhow::Ok(get(&server, &service, path, &[]).await?.header("cache-status").starts_with("walcast; hit"))
    };
    ensure!(kept(&paths[0]).await? && kept(&paths[1]).await?);
    postgres.execute("insert into notes (tenant_id, body) values (8, 'another''s')").await?;
    Reads::service(&server).heard().await?;
    ensure!(kept(&paths[0]).await? && kept(&paths[1]).await?, "another tenant's note ended these pages");
    postgres.execute("insert into notes (tenant_id, body) values (7, 'new')").await?;
    Reads::service(&server).heard().await?;
    ensure!(!kept(&paths[0]).await?, "the tenant's own note left its page");
    let wrong = get(&server, &service, "/query/v1/notes?tenant=7&after=x", &[]).await?;
    ensure!((wrong.status, wrong.json()?["code"].as_str()) == (400, Some("bad_cursor")), "{}", wrong.body);
    server.stop().await
}

#[tokio::test]
async fn a_batch_is_one_round_trip_in_order_with_each_answer_kept_as_its_own() -> Result<()> {
    let files = [
        ("notes", "-- param: tenant bigint\nselect id, body from notes where tenant_id = $1 order by id"),
        ("heavy", "-- param: n bigint\nselect count(*) + $1 as n from prices, generate_series(1, 100000)"),
        ("clock", "select now() as t"),
    ];
    let (postgres, _dir, server) = clinic(&files, &[("WALCAST_QUERIES__SLOW_MS", "1")]).await?;
    let service = server.token("service_role", None);
    warm(&server, &[&service], "/query/v1/notes?tenant=9").await?;
    let notes = |tenant: Value| json!({ "name": "notes", "params": { "tenant": tenant } });
    let alone = get(&server, &service, "/query/v1/notes?tenant=2", &[]).await?;
    let asked = json!({ "queries": [
        notes(json!(1)), { "name": "clock" }, notes(json!("x")), { "name": "nope" }, notes(json!(2)), notes(json!(3)), notes(json!(1)),
        { "name": "notes", "params": { "tenant": 2 }, "if_none_match": alone.header("etag") },
    ]});
    let answer = post(&server, &service, "/query/v1", &asked).await?.json()?;
    let results = answer["results"].as_array().context("no results")?.clone();
    let statuses: Vec<u64> = results.iter().filter_map(|one| one["status"].as_u64()).collect();
    ensure!(statuses == [200, 200, 400, 404, 200, 200, 200, 304], "{answer}");
    ensure!(results[2]["error"]["code"] == "bad_parameter" && results[3]["error"]["code"] == "unknown_query", "{answer}");
    ensure!(results[4]["body"] == alone.json()? && results[4]["etag"] == alone.header("etag"), "{answer}");
    ensure!(results[4]["cache"].as_str().is_some_and(|cache| cache.starts_with("walcast; hit")), "{answer}");
    ensure!(results[0]["body"] == results[6]["body"] && results[7].get("body").is_none(), "{answer}");

    // Many sets of one query are one statement.
    let heavy: Vec<Value> = (1..=20).map(|n| json!({ "name": "heavy", "params": { "n": n } })).collect();
    let answer = post(&server, &service, "/query/v1", &json!({ "queries": heavy })).await?.json()?;
    let bodies: Vec<i64> =
        answer["results"].as_array().into_iter().flatten().filter_map(|one| one["body"][0]["n"].as_i64()).collect();
    ensure!(bodies == (1..=20).map(|n| 500_000 + n).collect::<Vec<i64>>(), "{answer}");
    let slow = get(&server, &service, "/admin/v1/queries/slow", &[]).await?.json()?;
    let of_heavy: Vec<&Value> = slow["slow"].as_array().into_iter().flatten().filter(|slow| slow["query"] == "heavy").collect();
    ensure!(of_heavy.len() == 1 && of_heavy[0]["questions"] == 20, "{slow}");
    ensure!(of_heavy[0]["role"] == "service_role" && of_heavy[0]["plan"][0]["Plan"].is_object(), "{slow}");
    let user = server.token("authenticated", None);
    ensure!(get(&server, &user, "/admin/v1/queries/slow", &[]).await?.status == 403);

    // A write for one of them ends that one.
    postgres.execute("update notes set body = 'changed' where tenant_id = 3").await?;
    Reads::service(&server).heard().await?;
    let asked = json!({ "queries": [notes(json!(1)), notes(json!(2)), notes(json!(3))] });
    let answer = post(&server, &service, "/query/v1", &asked).await?.json()?;
    let hits: Vec<bool> =
        (0..3).map(|n| answer["results"][n]["cache"].as_str().is_some_and(|cache| cache.starts_with("walcast; hit"))).collect();
    ensure!(hits == [true, true, false], "{answer}");
    ensure!(answer["results"][2]["body"][0]["body"] == "changed", "{answer}");
    let many: Vec<Value> = (0..1001).map(|n| notes(json!(n))).collect();
    ensure!(post(&server, &service, "/query/v1", &json!({ "queries": many })).await?.status == 400);
    server.stop().await
}

/// Tenants whose answer over a table carries a tag, its own key among them, that lies in a slot of the clock which one of
/// these tags has raised: by chance two tags share a slot, and then fall together.
async fn sharing(postgres: &TestPostgres, table: &str, tenants: usize, raised: &[String]) -> Result<Vec<usize>> {
    let clock = TagClock::new(TagClock::DEFAULT_SLOTS, Floor(0));
    let slot = |tag: TagHash| clock.image(tag).index;
    let raised: HashSet<u32> = raised.iter().map(|tag| slot(Tag::stored(tag).hash())).collect();
    let client = postgres.connect().await?;
    let own = format!("{table}:tenant_id=");
    let kept = async || {
        let sql = "select namespace, key, tags from walcast.cache_entries where key like $1";
        let rows = client.query(sql, &[&format!("{table}@%")]).await.ok()?;
        (rows.len() >= tenants).then_some(rows)
    };
    let mut sharing = Vec::new();
    for row in wait::until_some(DEADLINE, format!("the answers over {table} are in the cache's table"), kept).await? {
        let tags: Vec<String> = row.get(2);
        let tenant = tags.iter().find_map(|tag| tag.strip_prefix(&own)).context("an answer that is not narrowed")?;
        let key = Tag::key(&CacheKey::new(row.get(0), row.get(1))?).hash();
        let mut carried = tags.iter().map(|tag| Tag::stored(tag).hash()).chain([key]);
        if carried.any(|tag| raised.contains(&slot(tag))) {
            sharing.push(tenant.parse()?);
        }
    }
    sharing.sort_unstable();
    Ok(sharing)
}

#[tokio::test]
async fn p4_with_a_thousand_tenants_a_write_of_one_leaves_the_other_999_cached() -> Result<()> {
    const TENANTS: usize = 1000;
    let files = [
        ("notes", "-- param: tenant bigint\nselect id, body from notes where tenant_id = $1 order by id"),
        ("some", "-- param: tenants bigint[]\nselect count(*) as n from notes where tenant_id = any ($1)"),
        ("two", "-- param: a bigint\n-- param: b bigint\nselect count(*) as n from notes where tenant_id in ($1, $2)"),
        ("orders", "select id, total from orders order by id"),
    ];
    let (postgres, _dir, server) = clinic(&files, &[]).await?;
    let service = server.token("service_role", None);
    let users: Vec<String> = (1..=TENANTS)
        .map(|tenant| walcast_testkit::jwt(SECRET, "authenticated", None, 3600, json!({ "tenant": tenant })))
        .collect();
    warm(&server, &[&service], "/query/v1/notes?tenant=9").await?;
    warm(&server, &[&service], "/query/v1/some?tenants={9}").await?;
    warm(&server, &[&service], "/query/v1/two?a=9&b=9").await?;
    warm(&server, &[&users[8]], "/query/v1/orders").await?;

    let by_parameter = async || {
        let queries: Vec<Value> = (1..=TENANTS).map(|n| json!({ "name": "notes", "params": { "tenant": n } })).collect();
        let answer = post(&server, &service, "/query/v1", &json!({ "queries": queries })).await?.json()?;
        let hit = |one: &Value| one["cache"].as_str().is_some_and(|cache| cache.starts_with("walcast; hit"));
        anyhow::Ok(answer["results"].as_array().context("no results")?.iter().map(hit).collect::<Vec<bool>>())
    };
    let http = reqwest::Client::new();
    let by_claim = async || {
        let ask = |token: String| {
            let request = http.get(format!("{}/query/v1/orders", server.url)).bearer_auth(token);
            async move {
                let answer = request.send().await?.error_for_status()?;
                let status = answer.headers().get("cache-status").and_then(|value| value.to_str().ok()).unwrap_or_default();
                anyhow::Ok(status.starts_with("walcast; hit"))
            }
        };
        let hits: Vec<Result<bool>> = stream::iter(users.iter().cloned()).map(ask).buffered(8).collect().await;
        hits.into_iter().collect::<Result<Vec<bool>>>()
    };
    let fell = |hits: &[bool]| hits.iter().enumerate().filter(|(_, hit)| !**hit).map(|(n, _)| n + 1).collect::<Vec<_>>();
    by_parameter().await?;
    by_claim().await?;
    ensure!(fell(&by_parameter().await?).is_empty() && fell(&by_claim().await?).is_empty(), "control: not all are kept");

    let raised = |table: &str, tenant: usize, ids: &[usize]| {
        let rows = ids.iter().map(|id| format!("{table}:id={id}"));
        let tags = ["~any", "tests:heard", "notes", "orders"].map(str::to_owned);
        rows.chain(tags).chain([format!("{table}:tenant_id={tenant}")]).collect::<Vec<_>>()
    };
    let mut all = raised("notes", 500, &[499, 1499, 2499]);
    all.extend(raised("orders", 700, &[699, 1699]));
    // Of the columns that no commit tells apart: with the first description of a table in a connection.
    all.extend(["notes:body=*", "notes:at=*", "orders:total=*"].map(str::to_owned));
    let expected_notes = sharing(&postgres, "notes", TENANTS, &all).await?;
    let expected_orders = sharing(&postgres, "orders", TENANTS, &all).await?;
    // Statistics that a busy table has gathered now and then make the stream describe it again, and mean nothing.
    postgres.execute("analyze notes; analyze orders").await?;
    postgres
        .execute(
            "update notes set body = 'changed' where tenant_id = 500; update orders set total = total + 1 where tenant_id = 700",
        )
        .await?;
    Reads::service(&server).heard().await?;
    let (notes, orders) = (fell(&by_parameter().await?), fell(&by_claim().await?));
    ensure!(expected_notes.contains(&500) && expected_orders.contains(&700), "control: {expected_notes:?}, {expected_orders:?}");
    ensure!(notes == expected_notes, "fell: notes of {notes:?} instead of {expected_notes:?}");
    ensure!(orders == expected_orders, "fell: orders of {orders:?} instead of {expected_orders:?}");

    // By a list and by an array: what is in it falls, what is not stays.
    let kept = async |path: &str| {
        anyhow::Ok(get(&server, &service, path, &[]).await?.header("cache-status").starts_with("walcast; hit"))
    };
    let paths =
        ["/query/v1/some?tenants={1,2}", "/query/v1/some?tenants={3,4}", "/query/v1/two?a=1&b=2", "/query/v1/two?a=3&b=4"];
    // Planned anew since the tables were described.
    warm(&server, &[&service], "/query/v1/some?tenants={9}").await?;
    warm(&server, &[&service], "/query/v1/two?a=9&b=9").await?;
    for path in paths {
        kept(path).await?;
        ensure!(kept(path).await?, "{path} is not kept");
    }
    postgres.execute("analyze notes").await?;
    postgres.execute("insert into notes (tenant_id, body) values (2, 'new')").await?;
    Reads::service(&server).heard().await?;
    let mut stayed = Vec::new();
    for path in paths {
        stayed.push(kept(path).await?);
    }
    ensure!(stayed == [false, true, false, true], "{stayed:?}");
    server.stop().await
}

#[tokio::test]
async fn answers_follow_a_namespace_and_fall_by_hand_and_nobody_reads_them_by_key() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &[]).await?;
    let dir = QueryDir::new(&[
        (
            "notes",
            "-- param: tenant bigint\n-- namespace: patients\n-- tags: tenant:{tenant}\nselect id from notes where tenant_id = $1",
        ),
        ("other", "-- param: tenant bigint\nselect id from notes where tenant_id = $1"),
    ])?;
    let config = dir.path().join("walcast.toml");
    std::fs::write(&config, "[cache.namespaces.patients]\nttl = \"7s\"\n[cache]\nstrict = true\n")?;
    let (folder, config) = (dir.setting(), config.to_string_lossy().into_owned());
    let server = Server::start(&postgres, &[("WALCAST_QUERIES__DIR", &folder), ("WALCAST_CONFIG", &config)]).await?;
    let service = server.token("service_role", None);
    let reads = Reads::service(&server);
    let status = async |path: &str| anyhow::Ok(get(&server, &service, path, &[]).await?.header("cache-status").to_owned());
    let (notes, other) = ("/query/v1/notes?tenant=007", "/query/v1/other?tenant=7");
    warm(&server, &[&service], "/query/v1/notes?tenant=9").await?;
    for by_hand in [json!({ "tags": ["tenant:7"] }), json!({ "tags": ["query:notes"] }), json!({ "namespace": "patients" })] {
        status(notes).await?;
        status(other).await?;
        let kept = status(notes).await?;
        let ttl: u64 = kept.split("ttl=").nth(1).and_then(|rest| rest.split(';').next()).unwrap_or("99").parse()?;
        ensure!(kept.starts_with("walcast; hit") && ttl <= 7, "{kept}");
        reads.invalidate(by_hand.clone()).await?;
        ensure!(!status(notes).await?.starts_with("walcast; hit"), "stayed after {by_hand}");
        ensure!(status(other).await?.starts_with("walcast; hit"), "the other query fell with {by_hand}");
    }
    for namespace in ["query.", "query.patients"] {
        let answer = get(&server, &service, &format!("/cache/v1/{namespace}/x"), &[]).await?;
        ensure!(answer.status == 403, "{namespace}: {} {}", answer.status, answer.body);
    }
    server.stop().await
}
