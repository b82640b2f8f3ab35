//! The realtime wire as unmodified clients see it: frames to the letter, joins that mean live, tokens that change and run
//! out, joins that cannot be. What a client should not do at all is in `realtime_limits`.

mod support;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use support::{DEADLINE, SECRET, Server, migrate};
use tokio::net::TcpStream;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async, tungstenite::Message};
use walcast_testkit::{RealtimeSocket, TestPostgres, Vsn, jwt};

const ADA: &str = "00000000-0000-4000-8000-00000000000a";
const BOB: &str = "00000000-0000-4000-8000-00000000000b";
const SCHEMA: &str = "
create table todos (id bigint primary key, owner uuid, title text, done boolean default false, secret text);
alter table todos enable row level security;
alter table todos replica identity full;
create policy own on todos for select to authenticated using (owner = auth.uid());
create policy published on todos for select to anon using (title = 'for all');
grant select (id, owner, title, done) on todos to authenticated, anon;
grant select on todos to service_role;
create table plain (id bigint primary key, n int);
grant select on plain to anon, authenticated, service_role;
create table unheard (id bigint primary key);
grant select on unheard to authenticated;";

async fn serving(settings: &[(&str, &str)]) -> Result<(TestPostgres, Server)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &["todos", "plain"]).await?;
    let server = Server::start(&postgres, settings).await?;
    Ok((postgres, server))
}

fn todos() -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "todos" }] })
}

fn plain() -> Value {
    json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "plain" }] })
}

async fn change(socket: &mut RealtimeSocket) -> Result<Value> {
    Ok(socket.next_where(|frame| frame.event == "postgres_changes", DEADLINE).await?.payload)
}

type Raw = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn raw(server: &Server, endpoint: &str, vsn: &str, key: &str) -> Result<Raw> {
    let url = format!("{}{endpoint}?apikey={key}&vsn={vsn}&log_level=info&unknown=1", server.url.replacen("http", "ws", 1));
    Ok(connect_async(url).await?.0)
}

async fn say(socket: &mut Raw, text: impl Into<String>) -> Result<()> {
    Ok(socket.send(Message::text(text.into())).await?)
}

async fn hear(socket: &mut Raw) -> Result<Value> {
    loop {
        match tokio::time::timeout(DEADLINE, socket.next()).await?.context("the socket was closed")?? {
            Message::Text(text) => return Ok(serde_json::from_str(&text)?),
            Message::Close(frame) => bail!("closed: {frame:?}"),
            _ => {}
        }
    }
}

/// The golden transcript, object framing and array framing, by either address.
#[tokio::test]
async fn p2_the_transcript_of_a_stock_client_is_answered_to_the_letter() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let ada = server.token("authenticated", Some(ADA));
    let mut row = 0;
    for endpoint in ["/realtime/v1/websocket", "/socket/websocket"] {
        for vsn in ["1.0.0", "2.0.0"] {
            row += 1;
            let one = vsn == "1.0.0";
            let frame = |join_ref: Value, reference: Value, event: &str, payload: Value| {
                let topic = if event == "heartbeat" { "phoenix" } else { "realtime:room1" };
                if one {
                    json!({ "topic": topic, "event": event, "payload": payload, "ref": reference, "join_ref": join_ref })
                } else {
                    json!([join_ref, reference, topic, event, payload])
                }
                .to_string()
            };
            // As it must come: object frames carry no join_ref.
            let expected = |join_ref: Value, reference: Value, topic: &str, event: &str, payload: Value| {
                if one {
                    json!({ "topic": topic, "event": event, "payload": payload, "ref": reference })
                } else {
                    json!([join_ref, reference, topic, event, payload])
                }
            };
            let mut socket = raw(&server, endpoint, vsn, &ada).await?;

            say(&mut socket, frame(Value::Null, json!("3"), "heartbeat", json!({}))).await?;
            let ok = json!({ "status": "ok", "response": {} });
            assert_eq!(hear(&mut socket).await?, expected(Value::Null, json!("3"), "phoenix", "phx_reply", ok.clone()));
            // The Python client's heartbeats have no ref.
            say(&mut socket, frame(Value::Null, Value::Null, "heartbeat", json!({}))).await?;
            assert_eq!(hear(&mut socket).await?, expected(Value::Null, Value::Null, "phoenix", "phx_reply", ok.clone()));

            let bindings = json!([
                { "event": "INSERT", "schema": "public", "table": "todos", "filter": format!("owner=eq.{ADA}") },
                { "event": "*", "schema": "public", "table": "todos" },
                { "event": "DELETE", "schema": "public", "table": "todos", "select": ["id"] },
                { "event": "*", "schema": "public", "table": "plain" },
            ]);
            let config = json!({ "config": { "broadcast": { "ack": false, "self": true }, "presence": { "key": "", "enabled": false },
                "postgres_changes": bindings, "private": false } });
            say(&mut socket, frame(json!("1"), json!("1"), "phx_join", config)).await?;
            let reply = hear(&mut socket).await?;
            let payload = if one { &reply["payload"] } else { &reply[4] };
            let echoed = payload["response"]["postgres_changes"].as_array().context("no postgres_changes")?.clone();
            let mut ids = Vec::new();
            let mut bare = Vec::new();
            for binding in &echoed {
                ids.push(binding["id"].as_u64().filter(|id| *id > 0).with_context(|| format!("no integer id: {binding}"))?);
                let mut binding = binding.as_object().context("an object")?.clone();
                binding.remove("id");
                bare.push(Value::Object(binding));
            }
            assert_eq!(Value::from(bare), bindings, "the same bindings, in the same order, absent keys absent");
            let answered = json!({ "status": "ok", "response": { "postgres_changes": echoed } });
            assert_eq!(reply, expected(json!("1"), json!("1"), "realtime:room1", "phx_reply", answered));

            let system = hear(&mut socket).await?;
            let (event, payload) = if one { (&system["event"], &system["payload"]) } else { (&system[3], &system[4]) };
            let subscribed = json!({ "extension": "postgres_changes", "status": "ok", "message": "Subscribed to PostgreSQL", "channel": "room1" });
            assert_eq!((event, payload), (&json!("system"), &subscribed));
            if !one {
                assert!(system[0].is_null() || system[0] == "1", "a client drops frames of another join: {system}");
            }

            postgres.execute(&format!("insert into todos (id, owner, title) values ({row}, '{ADA}', 'x')")).await?;
            postgres.execute(&format!("update todos set done = true where id = {row}")).await?;
            postgres.execute(&format!("delete from todos where id = {row}")).await?;
            let columns = json!([{ "name": "id", "type": "int8" }, { "name": "owner", "type": "uuid" },
                { "name": "title", "type": "text" }, { "name": "done", "type": "bool" }]);
            let old = json!({ "id": row, "owner": ADA, "title": "x", "done": false });
            let new = json!({ "id": row, "owner": ADA, "title": "x", "done": true });
            for (kind, record, old_record, ids) in [
                ("INSERT", Some(&old), None, vec![ids[0], ids[1]]),
                ("UPDATE", Some(&new), Some(&old), vec![ids[1]]),
                ("DELETE", None, Some(&new), vec![ids[1]]),
            ] {
                let came = hear(&mut socket).await?;
                let payload = if one { &came["payload"] } else { &came[4] };
                let stamp = payload["data"]["commit_timestamp"].as_str().context("no commit_timestamp")?.to_owned();
                assert!(stamp.len() == 24 && stamp.ends_with('Z') && &stamp[10..11] == "T" && &stamp[19..20] == ".", "{stamp}");
                let mut data = json!({ "schema": "public", "table": "todos", "type": kind, "commit_timestamp": stamp, "columns": columns, "errors": null });
                record.into_iter().for_each(|record| data["record"] = record.clone());
                old_record.into_iter().for_each(|record| data["old_record"] = record.clone());
                let wanted = json!({ "ids": ids, "data": data });
                assert_eq!(came, expected(Value::Null, Value::Null, "realtime:room1", "postgres_changes", wanted));
            }

            // Whoever selected columns hears of them by itself.
            let came = hear(&mut socket).await?;
            let payload = if one { &came["payload"] } else { &came[4] };
            assert_eq!(payload["ids"], json!([ids[2]]));
            assert_eq!((&payload["data"]["type"], &payload["data"]["old_record"]), (&json!("DELETE"), &json!({ "id": row })));

            say(&mut socket, frame(json!("1"), json!("5"), "phx_leave", json!({}))).await?;
            assert_eq!(hear(&mut socket).await?, expected(json!("1"), json!("5"), "realtime:room1", "phx_reply", ok.clone()));
            assert_eq!(hear(&mut socket).await?, expected(json!("1"), json!("1"), "realtime:room1", "phx_close", json!({})));
            // Leaving again is no error; anything else on a topic that was left is.
            say(&mut socket, frame(json!("1"), json!("6"), "phx_leave", json!({}))).await?;
            assert_eq!(hear(&mut socket).await?, expected(json!("1"), json!("6"), "realtime:room1", "phx_reply", ok));
            say(&mut socket, frame(json!("1"), json!("7"), "access_token", json!({}))).await?;
            let unmatched = json!({ "status": "error", "response": { "reason": "unmatched topic" } });
            assert_eq!(hear(&mut socket).await?, expected(json!("1"), json!("7"), "realtime:room1", "phx_reply", unmatched));
        }
    }
    server.stop().await
}

/// While others write all the time: what is committed after the reply is heard, and nothing comes before the reply.
#[tokio::test]
async fn p2_subscribed_means_live() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let token = server.token("authenticated", Some(ADA));
    let client = postgres.connect().await?;
    let writer = postgres.connect().await?;
    let writing = tokio::spawn(async move {
        for n in 1_000.. {
            if writer.execute("insert into plain values ($1, 0)", &[&(n as i64)]).await.is_err() {
                return;
            }
        }
    });
    let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    for n in 0..40_i64 {
        let topic = format!("realtime:room{n}");
        socket.join_ok(&topic, plain(), None).await?;
        client.execute("insert into plain values ($1, 1)", &[&n]).await?;
        let early: Vec<_> = socket.take_backlog().into_iter().filter(|frame| frame.topic == topic).collect();
        ensure!(early.is_empty(), "before the reply: {early:?}");
        let mut last = 0;
        loop {
            let frame = socket.next_where(|frame| frame.topic == topic, DEADLINE).await?;
            if frame.event == "system" {
                ensure!(last == 0 && frame.payload["status"] == "ok", "{}", frame.payload);
                continue;
            }
            let id = frame.payload["data"]["record"]["id"].as_i64().context("no id")?;
            if id == n {
                break;
            }
            ensure!(last == 0 || id == last + 1, "{id} after {last}: a gap");
            last = id;
        }
        socket.leave(&topic).await?;
        socket.take_backlog();
    }
    writing.abort();
    server.stop().await
}

#[tokio::test]
async fn a_second_join_of_a_topic_closes_the_first_and_events_come_once() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    socket.join_ok("realtime:a", plain(), None).await?;
    let first = socket.join_ref("realtime:a").context("no ref")?.to_owned();
    socket.join_ok("realtime:a", plain(), None).await?;
    let close = socket.next_where(|frame| frame.event == "phx_close", DEADLINE).await?;
    assert_eq!((close.join_ref.as_deref(), close.topic.as_str()), (Some(first.as_str()), "realtime:a"));
    postgres.execute("insert into plain values (1, 1); insert into plain values (2, 2)").await?;
    assert_eq!(change(&mut socket).await?["data"]["record"]["id"], 1);
    assert_eq!(change(&mut socket).await?["data"]["record"]["id"], 2, "each once");
    // Events that nobody knows and topics that nobody joined.
    socket.send("realtime:a", "dance", json!({})).await?;
    assert_eq!(socket.ask("realtime:b", "dance", json!({})).await?["response"]["reason"], "unmatched topic");
    assert_eq!(socket.join("realtime:", plain(), None).await?["status"], "error");
    assert_eq!(socket.join("other:a", plain(), None).await?["status"], "error");
    assert_eq!(socket.heartbeat().await?["status"], "ok");
    server.stop().await
}

#[tokio::test]
async fn p3_a_new_token_changes_what_is_heard_from_then_on() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let mut socket = RealtimeSocket::connect(&server.url, &server.token("anon", None), Vsn::V2).await?;
    let mut config = todos();
    config["postgres_changes"].as_array_mut().context("bindings")?.push(plain()["postgres_changes"][0].clone());
    let ada = jwt(SECRET, "authenticated", Some(ADA), 600, json!({}));
    socket.join_ok("realtime:a", config, Some(&ada)).await?;
    let mut id = 0;
    // The token that is sent; then whose rows are heard.
    for (token, heard) in [
        (None, Some(ADA)),
        (Some(jwt(SECRET, "authenticated", Some(ADA), 900, json!({}))), Some(ADA)),
        (Some(jwt(SECRET, "authenticated", Some(BOB), 900, json!({}))), Some(BOB)),
        (Some("sb_publishable_xyz".into()), Some(BOB)),
        (Some(jwt(SECRET, "anon", None, 900, json!({}))), None),
        (Some(jwt(SECRET, "authenticated", Some(ADA), 900, json!({}))), Some(ADA)),
    ] {
        if let Some(token) = token {
            socket.send("realtime:a", "access_token", json!({ "access_token": token })).await?;
            // A token has no answer; what is answered afterwards comes after it.
            socket.heartbeat().await?;
        }
        for owner in [ADA, BOB] {
            id += 1;
            postgres.execute(&format!("insert into todos (id, owner, title) values ({id}, '{owner}', 'x')")).await?;
        }
        postgres.execute(&format!("insert into plain values ({id}, 0)")).await?;
        let mut owners = Vec::new();
        loop {
            let event = change(&mut socket).await?;
            if event["data"]["table"] == "plain" {
                break;
            }
            owners.push(event["data"]["record"]["owner"].as_str().unwrap_or_default().to_owned());
        }
        assert_eq!(owners, heard.into_iter().collect::<Vec<_>>(), "after {id}");
    }
    // A token that is no token ends the channel, loudly.
    socket.send("realtime:a", "access_token", json!({ "access_token": "forged.forged.forged" })).await?;
    let ended = socket.next_where(|frame| frame.event == "phx_error" || frame.event == "phx_close", DEADLINE).await?;
    assert_eq!(ended.topic, "realtime:a");
    postgres.execute("insert into plain values (1000, 0)").await?;
    socket.heartbeat().await?;
    ensure!(socket.take_backlog().iter().all(|frame| frame.event != "postgres_changes"), "heard after the end");
    server.stop().await
}

#[tokio::test]
async fn p3_an_expired_token_hears_nothing_more_is_told_so_and_may_come_back() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let anon = server.token("anon", None);
    let short = jwt(SECRET, "authenticated", Some(ADA), 3, json!({}));
    let mut socket = RealtimeSocket::connect(&server.url, &anon, Vsn::V2).await?;
    socket.join_ok("realtime:a", todos(), Some(&short)).await?;
    let mut other = RealtimeSocket::connect(&server.url, &server.token("authenticated", Some(ADA)), Vsn::V1).await?;
    other.join_ok("realtime:o", todos(), None).await?;
    let insert = |id: i32| format!("insert into todos (id, owner, title) values ({id}, '{ADA}', 'x')");
    postgres.execute(&insert(1)).await?;
    assert_eq!(change(&mut socket).await?["data"]["record"]["id"], 1);

    let error = socket.next_where(|frame| frame.event == "phx_error", DEADLINE).await?;
    assert_eq!(error.topic, "realtime:a");
    postgres.execute(&insert(2)).await?;
    assert_eq!(change(&mut other).await?["data"]["record"]["id"], 1);
    assert_eq!(change(&mut other).await?["data"]["record"]["id"], 2, "others go on");
    socket.heartbeat().await?;
    ensure!(socket.take_backlog().iter().all(|frame| frame.event != "postgres_changes"), "heard after the token's end");

    // A stock client rejoins with the old token first: answered, but nothing is delivered until a good one comes.
    let reply = socket.join("realtime:a", todos(), Some(&short)).await?;
    assert_eq!(reply["status"], "ok", "{reply}");
    postgres.execute(&insert(3)).await?;
    assert_eq!(change(&mut other).await?["data"]["record"]["id"], 3);
    socket.heartbeat().await?;
    ensure!(socket.take_backlog().iter().all(|frame| frame.event != "postgres_changes"), "heard in quarantine");
    let fresh = server.token("authenticated", Some(ADA));
    socket.send("realtime:a", "access_token", json!({ "access_token": fresh })).await?;
    let live = socket.next_where(|frame| frame.event == "system", DEADLINE).await?;
    assert_eq!(live.payload["status"], "ok", "{}", live.payload);
    postgres.execute(&insert(4)).await?;
    assert_eq!(change(&mut socket).await?["data"]["record"]["id"], 4);

    // Nobody comes with a good one: it ends again.
    let reply = socket.join("realtime:b", todos(), Some(&short)).await?;
    assert_eq!(reply["status"], "ok", "{reply}");
    let error = socket.next_where(|frame| frame.event == "phx_error", DEADLINE).await?;
    assert_eq!(error.topic, "realtime:b");
    // A forged token gets no quarantine.
    let forged = jwt("another secret, of the same length and more", "authenticated", Some(ADA), -5, json!({}));
    assert_eq!(socket.join("realtime:c", todos(), Some(&forged)).await?["status"], "error");
    server.stop().await
}

#[tokio::test]
async fn keys_of_the_new_form_mean_the_connections_own_token() -> Result<()> {
    let (postgres, server) = serving(&[]).await?;
    let ada = server.token("authenticated", Some(ADA));
    for vsn in [Vsn::V1, Vsn::V2] {
        let mut socket = RealtimeSocket::connect(&server.url, &ada, vsn).await?;
        for (at, key) in ["sb_publishable_abc", "sb_secret_abc", ""].into_iter().enumerate() {
            socket.join_ok(&format!("realtime:{at}"), todos(), Some(key)).await?;
        }
        // The Python client sends its own key as a token, over and over.
        socket.send("realtime:0", "access_token", json!({ "access_token": ada })).await?;
        socket.send("realtime:0", "access_token", json!({ "access_token": null })).await?;
        socket.heartbeat().await?;
        postgres.execute(&format!("delete from todos; insert into todos (id, owner, title) values (1, '{ADA}', 'x')")).await?;
        let is_insert = |frame: &walcast_testkit::Frame| frame.payload["data"]["type"] == "INSERT";
        let mut topics = Vec::new();
        for _ in 0..3 {
            topics.push(socket.next_where(is_insert, DEADLINE).await?.topic);
        }
        topics.sort();
        assert_eq!(topics, ["realtime:0", "realtime:1", "realtime:2"]);
    }
    server.stop().await
}

#[tokio::test]
async fn a_join_that_cannot_be_is_refused_with_a_clear_reason() -> Result<()> {
    let (postgres, server) = serving(&[("WALCAST_REALTIME__MAX_TOPICS_PER_CONNECTION", "3")]).await?;
    let token = server.token("authenticated", Some(ADA));
    let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    for (binding, word) in [
        (json!({ "event": "*", "schema": "public", "table": "todos", "filter": "nothing=eq.1" }), "no column `nothing`"),
        (json!({ "event": "*", "schema": "public", "table": "todos", "filter": "secret=eq.1" }), "may not read column `secret`"),
        (json!({ "event": "*", "schema": "public", "table": "todos", "filter": "id=eq.one" }), "column `id`"),
        (json!({ "event": "*", "schema": "public", "table": "todos", "filter": "id=almost.1" }), "`almost`"),
        (json!({ "event": "*", "schema": "public", "table": "todos", "filter": "=eq.1" }), "Error parsing `filter` params"),
        (json!({ "event": "*", "schema": "public", "table": "unheard" }), "alter publication supabase_realtime add table"),
        (json!({ "event": "*", "schema": "public", "table": "nowhere" }), "no such table"),
        (json!({ "event": "*", "schema": "nowhere", "table": "todos" }), "no such table"),
        (json!({ "event": "*" }), "No subscription params provided"),
    ] {
        let reply = socket.join("realtime:wrong", json!({ "postgres_changes": [binding] }), None).await?;
        let reason = reply["response"]["reason"].as_str().unwrap_or_default();
        ensure!(reply["status"] == "error" && reason.contains(word) && reason.contains(": "), "{binding}: {reply}");
    }
    let anon = server.token("anon", None);
    let closed = json!({ "postgres_changes": [{ "event": "*", "schema": "public", "table": "unheard" }] });
    postgres.execute("alter publication supabase_realtime add table unheard").await?;
    let reply = socket.join("realtime:closed", closed, Some(&anon)).await?;
    ensure!(reply["response"]["reason"].as_str().unwrap_or_default().contains("may not select"), "{reply}");

    for topic in ["realtime:1", "realtime:2", "realtime:3"] {
        socket.join_ok(topic, plain(), None).await?;
    }
    let reply = socket.join("realtime:4", plain(), None).await?;
    ensure!(
        reply["response"]["reason"].as_str().unwrap_or_default().starts_with("ChannelRateLimitReached: Too many channels"),
        "{reply}"
    );
    socket.leave("realtime:1").await?;
    socket.join_ok("realtime:4", plain(), None).await?;
    for forged in ["garbage", &jwt("another secret, of the same length and more", "service_role", None, 60, json!({}))] {
        let reply = socket.join("realtime:2", plain(), Some(forged)).await?;
        assert_eq!(reply["status"], "error", "{forged}");
    }
    server.stop().await
}
