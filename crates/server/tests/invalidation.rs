//! Invalidation by hand over HTTP: each form takes what it must and nothing else, and stays true over fills in flight,
//! restarts and strangers' messages.

mod support;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use support::{
    DEADLINE, Server, migrate,
    reads::{By, Reads},
};
use walcast_testkit::{TestPostgres, wait};

const SCHEMA: &str = "create table items (id bigint primary key, shelf bigint references items, note text);
    create index on items (shelf);
    insert into items select i, null, 'x' from generate_series(1, 20) i;
    grant select on items to service_role;";

struct House {
    postgres: TestPostgres,
    server: Server,
    reads: Reads,
}

impl House {
    async fn open(settings: &[(&str, &str)]) -> Result<House> {
        let postgres = TestPostgres::start().await?;
        migrate(&postgres, SCHEMA, &[]).await?;
        let server = Server::start(&postgres, settings).await?;
        let reads = Reads::service(&server);
        Ok(House { postgres, server, reads })
    }

    async fn fill(&self, path: &str, tags: &str) -> Result<()> {
        if !self.reads.get(path).await?.is_fresh_hit() {
            let answer = self.reads.fill(path, tags, async || Ok("1".into())).await?;
            ensure!(answer == "stored", "{path}: {answer}");
        }
        Ok(())
    }

    async fn refill(&self) -> Result<()> {
        for (path, tags) in ENTRIES {
            self.fill(path, tags).await?;
        }
        Ok(())
    }

    async fn left(&self) -> Result<Vec<&'static str>> {
        let mut left = Vec::new();
        for (path, _) in ENTRIES {
            if self.reads.get(path).await?.is_hit() {
                left.push(*path);
            }
        }
        Ok(left)
    }

    async fn ask(&self, what: &Value) -> Result<(u16, Value)> {
        self.ask_as("service_role", what).await
    }

    async fn ask_as(&self, role: &str, what: &Value) -> Result<(u16, Value)> {
        let request = reqwest::Client::new().post(format!("{}/cache/v1/invalidate", self.server.url));
        let answer = request.bearer_auth(self.server.token(role, None)).json(what).send().await?;
        Ok((answer.status().as_u16(), answer.json().await?))
    }

    async fn in_l2(&self, rows: i64) -> Result<()> {
        let client = self.postgres.connect().await?;
        wait::until(DEADLINE, format!("the second tier has {rows} rows"), async || {
            let counted = client.query_one("select count(*) from walcast.cache_entries", &[]).await;
            counted.is_ok_and(|row| row.get::<_, i64>(0) >= rows)
        })
        .await
    }

    /// Until what was written so far will not be read from the slot again.
    async fn acknowledged(&self) -> Result<()> {
        let client = self.postgres.connect().await?;
        let end: String = client.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
        wait::until(DEADLINE, "the slot has passed it", async || {
            let sql = format!("select 1 from pg_replication_slots where slot_name = 'walcast' and confirmed_flush_lsn > '{end}'");
            client.query(&sql, &[]).await.is_ok_and(|rows| rows.len() == 1)
        })
        .await
    }
}

const USER_7: &str = "/cache/v1/users/user:7:name";
const USER_77: &str = "/cache/v1/users/user:77:name";
const PERCENT: &str = "/cache/v1/users/100%25_done";
const OTHER: &str = "/cache/v1/other/user:7:name";
const ROW: &str = "/cache/v1/rows/one";
const TABLE: &str = "/cache/v1/rows/all";
const ENTRIES: &[(&str, &str)] = &[
    (USER_7, "red, round"),
    (USER_77, "red"),
    (PERCENT, "round, far"),
    (OTHER, "red, round, far"),
    (ROW, "items:id=7"),
    (TABLE, "items"),
];

#[tokio::test]
async fn each_form_takes_what_it_names_and_a_dry_run_tells_so_and_takes_nothing() -> Result<()> {
    let house = House::open(&[]).await?;
    for (what, gone) in [
        (json!({ "namespace": "users", "keys": ["user:7:name", "none"] }), vec![USER_7]),
        (json!({ "tags": ["red", "far"] }), vec![USER_7, USER_77, PERCENT, OTHER]),
        (json!({ "tags": ["red", "far"], "match": "any" }), vec![USER_7, USER_77, PERCENT, OTHER]),
        (json!({ "tags": ["red", "round"], "match": "all" }), vec![USER_7, OTHER]),
        (json!({ "tags": ["red", "round"], "match": "all", "namespace": "users" }), vec![USER_7]),
        (json!({ "tags": ["red"], "namespace": "users" }), vec![USER_7, USER_77]),
        (json!({ "pattern": "user:7:*" }), vec![USER_7, OTHER]),
        (json!({ "pattern": "user:7?:*", "namespace": "users" }), vec![USER_77]),
        (json!({ "pattern": "100%_*" }), vec![PERCENT]),
        (json!({ "pattern": "user:7_name" }), vec![]),
        (json!({ "table": "items" }), vec![ROW, TABLE]),
        (json!({ "table": "public.items", "namespace": "users" }), vec![]),
        (json!({ "tags": ["items"] }), vec![TABLE]),
        (json!({ "namespace": "users" }), vec![USER_7, USER_77, PERCENT]),
        (json!({ "everything": true }), ENTRIES.iter().map(|(path, _)| *path).collect()),
    ] {
        house.refill().await?;
        let mut dry = what.clone();
        dry["dry_run"] = json!(true);
        let (status, told) = house.ask(&dry).await?;
        ensure!(status == 200 && told["invalidated"] == gone.len() && told["estimate"] == false, "{dry}: {told}");
        let mut sample: Vec<String> = serde_json::from_value(told["sample"].clone())?;
        let mut named: Vec<String> = gone.iter().map(|path| path.trim_start_matches("/cache/v1/").replace("%25", "%")).collect();
        sample.sort();
        named.sort();
        ensure!(sample == named, "{dry}: {told}");
        ensure!(house.left().await?.len() == ENTRIES.len(), "{dry} took something");

        let (status, told) = house.ask(&what).await?;
        ensure!(status == 200 && told["invalidated"] == gone.len() && told["position"].is_string(), "{what}: {told}");
        let left = house.left().await?;
        let expected: Vec<&str> = ENTRIES.iter().map(|(path, _)| *path).filter(|path| !gone.contains(path)).collect();
        ensure!(left == expected, "{what}: {left:?} are left");
        let (_, told) = house.ask(&dry).await?;
        ensure!(told["invalidated"] == 0, "{dry} afterwards, also of the second tier: {told}");
    }
    house.server.stop().await
}

#[tokio::test]
async fn p5_a_fill_whose_ticket_is_from_before_a_pattern_invalidation_is_refused_after_it() -> Result<()> {
    let house = House::open(&[]).await?;
    let tickets = [house.reads.get(USER_7).await?, house.reads.get(OTHER).await?];
    let control = house.reads.get(USER_77).await?;
    house.reads.invalidate(json!({ "pattern": "user:7:*" })).await?;
    // Control: deleting what is stored by key, as a cache without selections would, lets the fill of another key in.
    house.postgres.execute("delete from walcast.cache_entries where key like 'user:77:%'").await?;
    ensure!(house.reads.put(USER_77, By::Ticket(control.ticket()?), "", "old").await? == "stored", "the control lets it in");
    for (path, miss) in [USER_7, OTHER].iter().zip(&tickets) {
        let answer = house.reads.put(path, By::Ticket(miss.ticket()?), "", "old").await?;
        ensure!(answer == "touched" && !house.reads.get(path).await?.is_hit(), "{path}: {answer}");
        house.fill(path, "").await?;
    }
    // A transaction's invalidation holds exactly when it commits.
    let message = "select pg_logical_emit_message(true, 'walcast', '{\"invalidate\":{\"selection\":{\"pattern\":\"user:*\"}}}')";
    house.postgres.execute(&format!("begin; {message}; rollback")).await?;
    house.reads.heard().await?;
    ensure!(house.reads.get(USER_7).await?.is_hit(), "rolled back");
    house.postgres.execute(&format!("begin; {message}; commit")).await?;
    house.reads.heard().await?;
    ensure!(!house.reads.get(USER_7).await?.is_hit());
    house.server.stop().await
}

#[tokio::test]
async fn p5_a_restart_brings_nothing_back_that_a_selection_took_and_keeps_the_rest() -> Result<()> {
    let settings = [("WALCAST_STREAM__ACKNOWLEDGE_AFTER", "1s")];
    let mut house = House::open(&settings).await?;
    house.refill().await?;
    house.in_l2(ENTRIES.len() as i64).await?;
    house.reads.invalidate(json!({ "pattern": "user:7:*", "namespace": "users" })).await?;
    house.reads.invalidate(json!({ "tags": ["round", "far"], "match": "all" })).await?;
    house.reads.invalidate(json!({ "table": "items", "soft": true })).await?;
    house.acknowledged().await?;
    let client = house.postgres.connect().await?;
    // SQL that reads the table judges by the same checkpoint.
    let judged = "select array_agg(e.key) from walcast.cache_entries e, walcast.cache_standing() s
        where walcast.clock_admits(e.namespace, e.key, e.tags, e.settled, e.snapshot, s.slots)";
    let keys: Vec<String> = client.query_one(judged, &[]).await?.get(0);
    ensure!(keys == ["user:77:name"], "{keys:?}");
    for how in ["stopped", "killed", "stopped"] {
        if how == "killed" {
            house.server.kill9().await?;
            house.server.start_again().await?;
        } else {
            house.server.stop().await?;
            house.server = Server::start(&house.postgres, &settings).await?;
        }
        house.reads = Reads::service(&house.server);
        // Control: the rows are still there, so it is the list of the checkpoint that judges.
        let rows: i64 = client.query_one("select count(*) from walcast.cache_entries", &[]).await?.get(0);
        ensure!(rows == ENTRIES.len() as i64, "{how}: {rows} rows");
        let left = house.left().await?;
        ensure!(left == [USER_77], "{how}: {left:?} are left");
    }
    // Control: without the list, the checkpoint's clock alone answers them all.
    house.server.stop().await?;
    client.batch_execute("delete from walcast.selections").await?;
    house.server = Server::start(&house.postgres, &settings).await?;
    house.reads = Reads::service(&house.server);
    let left = house.left().await?;
    ensure!(left.len() == ENTRIES.len(), "the clock alone should not know: {left:?}");
    house.server.stop().await
}

#[tokio::test]
async fn a_soft_invalidation_is_answered_stale_once_with_a_ticket_and_fresh_when_it_was_made_anew() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("walcast.toml");
    std::fs::write(&file, "[cache.namespaces.users]\nstale_while_revalidate = \"1h\"\n")?;
    let house = House::open(&[("WALCAST_CONFIG", &file.to_string_lossy())]).await?;
    for what in [
        json!({ "pattern": "user:7:*", "soft": true }),
        json!({ "namespace": "users", "keys": ["user:7:name"], "soft": true }),
        json!({ "tags": ["red"], "soft": true }),
        json!({ "namespace": "users", "soft": true }),
        json!({ "everything": true, "soft": true }),
    ] {
        house.refill().await?;
        let early = house.reads.get("/cache/v1/users/user:7:other").await?;
        house.reads.invalidate(what.clone()).await?;
        let stale = house.reads.get(USER_7).await?;
        ensure!(stale.is_stale() && stale.cache_status.ends_with("detail=softened") && stale.body == "1", "{what}: {stale:?}");
        let position = house.reads.invalidate(json!({ "tags": ["tests:heard"] })).await?;
        ensure!(!house.reads.get_at_least(USER_7, &position).await?.is_hit(), "{what}: not to who asks for more");
        if what.get("pattern").is_some() {
            ensure!(!house.reads.get(OTHER).await?.is_hit(), "a namespace that answers nothing stale");
            let path = "/cache/v1/users/user:7:other";
            ensure!(house.reads.put(path, By::Ticket(early.ticket()?), "", "old").await? == "touched");
        }
        ensure!(stale.ticket.is_some(), "{what}: one reader is to make it anew: {stale:?}");
        // Until the invalidation has settled, what was read may be from before it, and is not kept.
        house.reads.put(USER_7, By::Ticket(stale.ticket()?), "red, round", "2").await?;
        let anew = async || -> Result<bool> {
            let seen = house.reads.get(USER_7).await?;
            if let Some(ticket) = &seen.ticket {
                house.reads.put(USER_7, By::Ticket(ticket), "red, round", "2").await?;
            }
            Ok(seen.is_fresh_hit() && seen.body == "2")
        };
        wait::until(DEADLINE, format!("{what}: made anew"), async || anew().await.unwrap_or(false)).await?;
        // Hard after soft leaves nothing to answer.
        house.reads.invalidate(json!({ "namespace": "users", "soft": true })).await?;
        house.reads.invalidate(json!({ "namespace": "users", "pattern": "*" })).await?;
        ensure!(!house.reads.get(USER_7).await?.is_hit(), "{what}");
    }
    house.server.stop().await
}

#[tokio::test]
async fn p7_a_full_list_of_selections_widens_and_the_widened_ones_survive_a_restart() -> Result<()> {
    let settings = [("WALCAST_STREAM__ACKNOWLEDGE_AFTER", "1s")];
    let mut house = House::open(&settings).await?;
    house.refill().await?;
    house.in_l2(ENTRIES.len() as i64).await?;
    // Checkpointed before it is widened: its own stamp is older than that checkpoint.
    house.reads.invalidate(json!({ "pattern": "user:7:*", "namespace": "users" })).await?;
    house.acknowledged().await?;
    let flood = "select pg_logical_emit_message(true, 'walcast', json_build_object('invalidate',
        json_build_object('selection', json_build_object('namespace', 'flood', 'pattern', 'k' || i)))::text)
        from generate_series(1, 300) i";
    house.postgres.execute(flood).await?;
    house.reads.heard().await?;
    let expected = [OTHER, ROW, TABLE];
    ensure!(house.left().await? == expected, "{:?}", house.left().await?);
    house.acknowledged().await?;
    house.server.kill9().await?;
    house.server.start_again().await?;
    ensure!(house.left().await? == expected, "after a restart: {:?}", house.left().await?);
    house.refill().await?;
    ensure!(house.left().await?.len() == ENTRIES.len(), "what is read afterwards is kept");
    house.server.stop().await
}

#[tokio::test]
async fn an_invalidation_from_strangers_that_cannot_be_understood_takes_everything_and_garbage_nothing() -> Result<()> {
    let house = House::open(&[]).await?;
    let emit = async |content: &str| {
        let content = content.replace('\'', "''");
        house.postgres.execute(&format!("select pg_logical_emit_message(true, 'walcast', '{content}')")).await?;
        house.reads.heard().await
    };
    for garbage in ["", "x", "[]", "{\"broadcast\": {}}", "{\"heartbeat\": {\"nonce\": \"me\", \"at_ms\": 1}}", "{\"invalidate"] {
        house.refill().await?;
        emit(garbage).await?;
        ensure!(house.left().await?.len() == ENTRIES.len(), "{garbage}");
    }
    let many: Vec<String> = (0..5_000).map(|n| format!("t{n}")).collect();
    for unclear in [
        json!({ "invalidate": { "tag": ["red"] } }),
        json!({ "invalidate": { "tags": many } }),
        json!({ "invalidate": { "selection": { "pattern": "" } } }),
        json!({ "invalidate": { "selection": { "namespace": "n", "all_of": ["a\u{0}"] } } }),
    ] {
        house.refill().await?;
        emit(&unclear.to_string()).await?;
        ensure!(house.left().await?.is_empty(), "{:.80}", unclear.to_string());
    }
    house.refill().await?;
    ensure!(house.left().await?.len() == ENTRIES.len());
    house.server.stop().await
}

#[tokio::test]
async fn bodies_that_name_nothing_too_much_or_two_things_are_refused_with_a_code() -> Result<()> {
    let house = House::open(&[]).await?;
    house.refill().await?;
    let many: Vec<String> = (0..1_001).map(|n| n.to_string()).collect();
    for (body, status, code) in [
        (json!({}), 400, "nothing_named"),
        (json!({ "soft": true }), 400, "nothing_named"),
        (json!({ "namespace": "users", "keys": [] }), 400, "nothing_named"),
        (json!({ "tags": [] }), 400, "nothing_named"),
        (json!([]), 400, "bad_body"),
        (json!({ "tag": ["a"] }), 400, "bad_body"),
        (json!({ "tags": ["a"], "match": "most" }), 400, "bad_body"),
        (json!({ "everything": "yes" }), 400, "bad_body"),
        (json!({ "keys": ["a"] }), 400, "namespace_required"),
        (json!({ "namespace": "users", "match": "all" }), 400, "match_without_tags"),
        (json!({ "tags": ["a"], "table": "items" }), 400, "one_at_a_time"),
        (json!({ "namespace": "users", "keys": ["a"], "pattern": "b" }), 400, "one_at_a_time"),
        (json!({ "namespace": "users", "everything": true }), 400, "one_at_a_time"),
        (json!({ "pattern": "" }), 400, "bad_pattern"),
        (json!({ "pattern": "a\u{7}" }), 400, "bad_pattern"),
        (json!({ "pattern": "x".repeat(513) }), 400, "bad_pattern"),
        (json!({ "tags": ["~all"] }), 400, "bad_tag"),
        (json!({ "namespace": "users", "keys": ["a\n"] }), 400, "bad_key"),
        (json!({ "tags": many }), 400, "too_many_names"),
        (json!({ "table": "nobodys" }), 404, "unknown_table"),
        (json!({ "table": "items; drop table items" }), 404, "unknown_table"),
    ] {
        let (was, answer) = house.ask(&body).await?;
        ensure!(was == status && answer["code"] == code && answer["hint"].is_string(), "{body:.60}: {was} {answer}");
    }
    // Without a namespace it reaches everywhere: not for everybody.
    for body in [json!({ "pattern": "*" }), json!({ "everything": true }), json!({ "table": "items", "dry_run": true })] {
        let (status, answer) = house.ask_as("authenticated", &body).await?;
        ensure!(status == 403 && answer["code"] == "role_not_allowed", "{body}: {answer}");
    }
    let (status, _) = house.ask_as("authenticated", &json!({ "namespace": "users", "pattern": "*", "dry_run": true })).await?;
    ensure!(status == 403, "nor is another's namespace");
    ensure!(house.left().await?.len() == ENTRIES.len(), "nothing refused took anything");
    house.server.stop().await
}
