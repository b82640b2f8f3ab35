//! A database with the cache's functions, a served Walcast, and the short ways to both.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::process::Command;
use tokio_postgres::Client;
use walcast_testkit::{TestPostgres, wait};

use crate::support::{DEADLINE, SERVE_ROLE, Server, reads::Reads};

const CONFIG: &str = "
[cache.namespaces.notes]
read = ['authenticated']
write = ['authenticated']
invalidate = ['authenticated']
[cache.namespaces.sql]
read = ['authenticated']
write = ['authenticated']
[cache.namespaces.sessions]
source = 'external'
[cache.namespaces.mine]
per_context = true
read = ['authenticated']
";

const SCHEMA: &str = "
create table items (id bigint primary key, version bigint not null);
insert into items select i, 1 from generate_series(1, 100) i;
create table diary (body text);
create table diary_pages (id bigint primary key, owner text, body text);
insert into diary_pages values (1, 'ann', 'ann''s page'), (2, 'bob', 'bob''s page');
grant select on diary_pages to authenticated;
alter table diary_pages enable row level security;
create policy own on diary_pages to authenticated using (owner = auth.jwt() ->> 'sub');
create role nobody login;
create role nurse login in role authenticated;
create function report() returns jsonb language plpgsql as $$ begin return (select jsonb_agg(body order by id) from diary_pages); end $$;
create function through_owner() returns jsonb language sql security definer
  as $$ select walcast.cached('report()', tags => array['diary_pages']) $$;
create function secret() returns int language sql as 'select 1';
revoke all on function secret() from public;
create function many() returns setof int language sql as 'select 1';
create function nothing() returns void language sql as 'select 1';
create function add(int, numeric) returns numeric language sql as 'select $1 + $2';
create function tenants() returns text language sql as $$ select current_setting('app.tenant', true) $$;
create function first_version() returns bigint language sql as 'select version from items where id = 1';
create table counter (n bigint); insert into counter values (0);
create function count_up() returns bigint language sql as 'update counter set n = n + 1 returning n';";

pub struct Room {
    pub postgres: TestPostgres,
    pub server: Server,
    pub reads: Reads,
    config: tempfile::TempDir,
}

impl Room {
    pub async fn open() -> Result<Room> {
        let postgres = TestPostgres::start().await?;
        let config = tempfile::tempdir()?;
        let path = config.path().join("walcast.toml");
        std::fs::write(&path, CONFIG)?;
        // Twice: roles and auth.jwt() before the schema, its tables afterwards.
        migrate(&postgres, &path).await?;
        postgres.execute(SCHEMA).await?;
        migrate(&postgres, &path).await?;
        let server = Server::start(&postgres, &[("WALCAST_CONFIG", &path.to_string_lossy())]).await?;
        let reads = Reads::service(&server);
        Ok(Room { postgres, server, reads, config })
    }

    /// What `walcast migrate --print` shows to one who has not named a database.
    pub async fn printed(&self) -> Result<String> {
        let config = self.config.path().join("walcast.toml");
        let program = env!("CARGO_BIN_EXE_walcast");
        let output = Command::new(program).args(["migrate", "--print"]).env("WALCAST_CONFIG", config).output().await?;
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Migrates with another config.
    pub async fn configure(&self, text: &str) -> Result<()> {
        let path = self.config.path().join("walcast.toml");
        std::fs::write(&path, text)?;
        migrate(&self.postgres, &path).await
    }

    /// Until SQL believes the checkpoint.
    pub async fn believed(&self, client: &Client) -> Result<()> {
        wait::until(DEADLINE, "SQL believes the checkpoint", async || {
            let sql = "select walcast.cache_fence() not in ('none') and settled_lsn > '0/0' from walcast.sentinel";
            client.query_opt(sql, &[]).await.is_ok_and(|row| row.is_some_and(|row| row.get(0)))
        })
        .await?;
        self.settled(client).await
    }

    /// Until the checkpoint says that everything up to now is settled.
    pub async fn settled(&self, client: &Client) -> Result<()> {
        self.checkpoint_past(client, "settled_lsn").await
    }

    /// Until the checkpoint has everything up to now.
    pub async fn checkpointed(&self, client: &Client) -> Result<()> {
        self.checkpoint_past(client, "clock_lsn").await
    }

    async fn checkpoint_past(&self, client: &Client, mark: &str) -> Result<()> {
        let now: String = client.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
        let sql = format!("select 1 from walcast.sentinel where {mark} > '{now}'");
        wait::until(DEADLINE, format!("the checkpoint's {mark} is past {now}"), async || {
            client.query(&sql, &[]).await.is_ok_and(|rows| rows.len() == 1)
        })
        .await
    }

    pub async fn version(&self, client: &Client, id: i64) -> Result<i64> {
        Ok(client.query_one("select version from items where id = $1", &[&id]).await?.get(0))
    }

    /// Reads an item's version and sets it under a key, in a transaction of one snapshot.
    pub async fn set(&self, client: &Client, key: &str, id: i64) -> Result<bool> {
        client.batch_execute("begin isolation level repeatable read").await?;
        let stored = self.set_in_transaction(client, key, id).await;
        client.batch_execute(if stored.is_ok() { "commit" } else { "rollback" }).await?;
        stored
    }

    /// The same in the transaction that is open. Under read committed one statement takes the fence and reads: which is
    /// sound, since both are of its snapshot.
    pub async fn set_in_transaction(&self, client: &Client, key: &str, id: i64) -> Result<bool> {
        let sql = "select walcast.cache_set('notes', $1::text, to_jsonb(version), tags => array['items:id=' || id], fence => walcast.cache_fence()) \
                   from items where id = $2";
        Ok(client.query_one(sql, &[&key, &id]).await?.get(0))
    }

    pub async fn set_with_fence(&self, client: &Client, key: &str, id: i64) -> Result<bool> {
        let fence: String = client.query_one("select walcast.cache_fence()", &[]).await?.get(0);
        let version = self.version(client, id).await?;
        let sql = "select walcast.cache_set('notes', $1::text, to_jsonb($2::bigint), tags => array['items:id=' || $3::bigint], fence => $4::text)";
        Ok(client.query_one(sql, &[&key, &version, &id, &fence]).await?.get(0))
    }

    pub async fn get(&self, client: &Client, key: &str) -> Result<Option<Value>> {
        Ok(client.query_one("select walcast.cache_get('notes', $1::text)", &[&key]).await?.get(0))
    }

    pub async fn bytes(&self, client: &Client, key: &str) -> Result<Option<Vec<u8>>> {
        Ok(client.query_one("select walcast.cache_get_bytes('notes', $1::text)", &[&key]).await?.get(0))
    }

    /// A connection as PostgREST leaves it: a role taken, the claims set.
    pub async fn person(&self, name: &str) -> Result<Client> {
        let client = self.postgres.connect().await?;
        let claims = format!("{{\"sub\":\"{name}\",\"role\":\"authenticated\"}}");
        client.batch_execute(&format!("set role authenticated; set \"request.jwt.claims\" = '{claims}'")).await?;
        Ok(client)
    }
}

async fn migrate(postgres: &TestPostgres, config: &Path) -> Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_walcast"))
        .args(["migrate", "--database-url", &postgres.url(), "--serve-role", SERVE_ROLE])
        .env("WALCAST_CONFIG", config)
        .output()
        .await?;
    ensure!(output.status.success(), "walcast migrate: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The message of a refusal. Our own say how to mend it; PostgreSQL's need not.
pub async fn refused(client: &Client, sql: &str) -> Result<String> {
    let Err(error) = client.batch_execute(sql).await else { bail!("not refused: {sql}") };
    let error = error.as_db_error().with_context(|| format!("{sql}: {error}"))?;
    let ours = error.where_().is_some_and(|place| place.starts_with("PL/pgSQL function walcast.") && place.contains("at RAISE"));
    ensure!(!ours || error.hint().is_some(), "no hint: {error:?}");
    Ok(error.message().to_owned())
}
