//! The cache table in a throw-away PostgreSQL, and caches over it.

use std::time::Duration;

use walcast_cache::{CacheConfig, L2, L2Config, MIGRATIONS};
use walcast_model::Epoch;
use walcast_pg::{ConnectConfig, Pool};
use walcast_testkit::TestPostgres;

use super::{World, world_with};

/// With the tables of this room. From its fourth file on there are functions for SQL, which stand on the tables of others.
pub async fn postgres() -> TestPostgres {
    let postgres = TestPostgres::start().await.unwrap();
    postgres.execute("create schema walcast; revoke all on schema walcast from public").await.unwrap();
    for (_, sql) in MIGRATIONS.iter().filter(|(name, _)| *name < "cache/0004") {
        postgres.execute(sql).await.unwrap();
    }
    postgres
}

/// A Walcast that has just started: empty L1, a clock that knows of no commit, the table as it is.
pub fn node(postgres: &TestPostgres, config: L2Config) -> World {
    node_at(&postgres.url(), config)
}

pub fn node_at(url: &str, config: L2Config) -> World {
    node_of(url, config, CacheConfig::default())
}

pub fn node_of(url: &str, config: L2Config, cache: CacheConfig) -> World {
    let pool = Pool::new(&ConnectConfig::parse(url).unwrap(), 3, Duration::from_secs(5)).unwrap();
    let world = world_with(cache, Some(L2::start(pool, config)));
    world.cache.set_epoch(Epoch(7));
    world
}

/// Patient: tests share two cores.
pub fn patient() -> L2Config {
    L2Config { read_timeout: Duration::from_secs(20), write_timeout: Duration::from_secs(20), ..L2Config::default() }
}

pub async fn flush(world: &World) {
    world.cache.l2().unwrap().flush().await;
}

pub async fn number(postgres: &TestPostgres, sql: &str) -> i64 {
    postgres.connect().await.unwrap().query_one(sql, &[]).await.unwrap().get(0)
}
