//! P3: a policy that fails for somebody's claims shows him nothing and tells him nothing, as a query would.

mod support;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use support::{DEADLINE, SECRET, Server, migrate};
use walcast_testkit::{RealtimeSocket, TestPostgres, Vsn, jwt};

const SCHEMA: &str = "
create table secrets (id bigint primary key, level int, ssn text);
alter table secrets enable row level security;
alter table secrets replica identity full;
create table open (id bigint primary key);
grant select on secrets, open to authenticated;";

/// The second is beyond what is decided in memory.
const POLICIES: [&str; 2] =
    ["level = (auth.jwt() -> 'user_metadata' ->> 'n')::int", "level + 0 = (auth.jwt() -> 'user_metadata' ->> 'n')::int"];

async fn joined(server: &Server, n: &str) -> Result<RealtimeSocket> {
    let token = jwt(SECRET, "authenticated", Some("somebody"), 3600, json!({ "user_metadata": { "n": n } }));
    let mut socket = RealtimeSocket::connect(&server.url, &token, Vsn::V2).await?;
    let config = json!({ "postgres_changes": [
        { "event": "*", "schema": "public", "table": "secrets", "filter": "ssn=eq.123-45" },
        { "event": "*", "schema": "public", "table": "open" },
    ] });
    socket.join_ok("realtime:secrets", config, None).await?;
    socket.next_where(|frame| frame.event == "system", DEADLINE).await?;
    Ok(socket)
}

/// What comes until the row of `open` does.
async fn until_open(socket: &mut RealtimeSocket) -> Result<Vec<Value>> {
    let mut heard = Vec::new();
    loop {
        let frame = socket.next_event(DEADLINE).await?;
        if frame.payload["data"]["table"] == "open" {
            return Ok(heard);
        }
        heard.push(frame.payload);
    }
}

#[tokio::test]
async fn p3_a_claim_that_a_policy_cannot_cast_is_no_way_to_search_hidden_rows() -> Result<()> {
    for policy in POLICIES {
        let postgres = TestPostgres::start().await?;
        let schema = format!("{SCHEMA} create policy p on secrets for select using ({policy});");
        migrate(&postgres, &schema, &["secrets", "open"]).await?;
        let server = Server::start(&postgres, &[]).await?;
        let (mut sees, mut fails) = (joined(&server, "1").await?, joined(&server, "x").await?);
        postgres.execute("insert into secrets values (1, 1, '123-45'); insert into secrets values (2, 2, '123-45')").await?;
        postgres.execute("update secrets set ssn = '123-45' where id = 1; insert into open values (1)").await?;
        let heard = until_open(&mut sees).await?;
        ensure!(heard.len() == 2 && heard.iter().all(|one| one["data"]["record"]["id"] == 1), "control: {policy}: {heard:?}");
        let heard = until_open(&mut fails).await?;
        ensure!(heard.is_empty(), "{policy}: {heard:?}");
        server.stop().await?;
    }
    Ok(())
}
