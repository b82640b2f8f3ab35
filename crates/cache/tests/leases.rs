//! Two processes over one cache table: one computes, the other waits for its row.

mod common;

use std::time::Duration;

use common::{
    World, computed, fence, key,
    readers::{Gate, Outcome, fresh, options, reader_of, text, until},
    world_with,
};
use tokio::task::JoinHandle;
use walcast_cache::{AtLeast, CacheConfig, ComputeOptions, L2, L2Config, MIGRATIONS, Source};
use walcast_model::{Epoch, Xid};
use walcast_pg::{ConnectConfig, Pool};
use walcast_testkit::TestPostgres;

async fn postgres() -> TestPostgres {
    let postgres = TestPostgres::start().await.unwrap();
    postgres.execute("create schema walcast").await.unwrap();
    // What comes after is the face for SQL, which needs the other rooms.
    for (_, sql) in MIGRATIONS.iter().filter(|(name, _)| *name < "cache/0004") {
        postgres.execute(sql).await.unwrap();
    }
    postgres
}

/// A process of its own, as far as the cache can tell.
fn process(postgres: &TestPostgres) -> World {
    let pool = Pool::new(&ConnectConfig::parse(&postgres.url()).unwrap(), 3, Duration::from_secs(5)).unwrap();
    let patient = Duration::from_secs(20);
    let l2 = L2::start(pool, L2Config { read_timeout: patient, write_timeout: patient, ..L2Config::default() });
    let world = world_with(CacheConfig { lease: true, ..CacheConfig::default() }, Some(l2));
    world.cache.set_epoch(Epoch(7));
    world
}

fn patient() -> ComputeOptions {
    ComputeOptions { timeout: Duration::from_secs(60), ..options() }
}

fn readers(w: &World, gate: &Gate, count: usize) -> Vec<JoinHandle<Outcome>> {
    let answer = fresh("seven", fence("10:20:", 50));
    (0..count).map(|_| reader_of("7", &w.cache, gate, patient(), answer.clone())).collect()
}

async fn leases(postgres: &TestPostgres) -> i64 {
    postgres.connect().await.unwrap().query_one("select count(*) from walcast.cache_leases", &[]).await.unwrap().get(0)
}

async fn until_released(postgres: &TestPostgres) {
    let wait = async {
        while leases(postgres).await > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("the lease is never let go");
}

#[tokio::test]
async fn of_two_processes_with_fifty_readers_each_one_computes() {
    let postgres = postgres().await;
    let (one, two, gate) = (process(&postgres), process(&postgres), Gate::new());
    let mut all = readers(&one, &gate, 50);
    all.extend(readers(&two, &gate, 50));
    until("one computing, the other waiting", || {
        gate.begun() == 1 && one.cache.stats().lease_waits.get() + two.cache.stats().lease_waits.get() == 1
    })
    .await;
    gate.go.add_permits(100);
    for reader in all {
        assert_eq!(text(&reader.await.unwrap()), "seven");
    }
    assert_eq!(gate.begun(), 1);
    until_released(&postgres).await;
}

#[tokio::test]
async fn without_leases_each_process_computes_for_itself() {
    let postgres = postgres().await;
    let pool = || Pool::new(&ConnectConfig::parse(&postgres.url()).unwrap(), 3, Duration::from_secs(5)).unwrap();
    let gate = Gate::new();
    let worlds = [0, 1].map(|_| world_with(CacheConfig::default(), Some(L2::start(pool(), L2Config::default()))));
    let all: Vec<_> = worlds.iter().flat_map(|w| readers(w, &gate, 5)).collect();
    until("both computing", || gate.begun() == 2).await;
    gate.go.add_permits(10);
    for reader in all {
        assert_eq!(text(&reader.await.unwrap()), "seven");
    }
}

#[tokio::test]
async fn a_computation_that_failed_or_went_lets_the_other_process_compute_at_once() {
    let postgres = postgres().await;
    let (one, two) = (process(&postgres), process(&postgres));
    for (n, name) in ["failed", "went"].into_iter().enumerate() {
        let (first, second) = (Gate::new(), Gate::new());
        let holder = reader_of(name, &one.cache, &first, patient(), || Err("permission denied".to_owned()));
        until("the holder computing", || first.begun() == 1).await;
        let waits = reader_of(name, &two.cache, &second, patient(), fresh("seven", fence("10:20:", 50)));
        until("the other waiting", || two.cache.stats().lease_waits.get() == n as u64 + 1).await;
        assert_eq!(second.begun(), 0);
        second.go.add_permits(1);
        match name {
            "failed" => first.go.add_permits(1),
            _ => holder.abort(),
        }
        // Not by the lease running out: half of the reader's time is longer than that would take, so ask the table.
        until_released(&postgres).await;
        assert_eq!((text(&waits.await.unwrap()), second.begun()), ("seven".to_owned(), 1));
        drop(holder);
    }
}

#[tokio::test]
async fn p6_a_holder_who_died_only_delays_the_others_and_a_table_that_is_away_delays_nobody() {
    let postgres = postgres().await;
    let w = process(&postgres);
    let dead = "insert into walcast.cache_leases select digest, 'dead', clock_timestamp() + $2 * interval '1 s' from (select $1::bytea) d (digest)";
    let client = postgres.connect().await.unwrap();
    let gate = Gate::new();
    gate.go.add_permits(100);

    client.execute(dead, &[&&key("runs out").digest()[..], &0.5_f64]).await.unwrap();
    let outcome = reader_of("runs out", &w.cache, &gate, patient(), fresh("late", fence("10:20:", 50))).await.unwrap();
    assert_eq!((text(&outcome), w.cache.stats().lease_waits.get()), ("late".to_owned(), 1));

    client.execute(dead, &[&&key("too long").digest()[..], &3600_f64]).await.unwrap();
    let hasty = ComputeOptions { timeout: Duration::from_secs(4), ..options() };
    let outcome = reader_of("too long", &w.cache, &gate, hasty, fresh("half its time", fence("10:20:", 50))).await.unwrap();
    assert_eq!(text(&outcome), "half its time", "computed without a lease");

    client.execute("drop table walcast.cache_leases", &[]).await.unwrap();
    let outcome = reader_of("away", &w.cache, &gate, patient(), fresh("computed", fence("10:20:", 50))).await.unwrap();
    assert_eq!((text(&outcome), w.cache.stats().l2_errors.get() > 0), ("computed".to_owned(), true));
}

#[tokio::test]
async fn p4_what_the_other_process_computed_is_judged_for_each_reader() {
    let postgres = postgres().await;
    let (one, two, gate) = (process(&postgres), process(&postgres), Gate::new());
    let holder = reader_of("7", &one.cache, &gate, patient(), fresh("before", fence("10:20:", 50)));
    until("the holder computing", || gate.begun() == 1).await;
    two.commit(100, 20, &["patients:id=7"]);
    let asked = ComputeOptions { at_least: AtLeast::Xid(Xid(20)), ..patient() };
    let told = reader_of("7", &two.cache, &gate, asked, || Ok(computed("after", &["patients:id=7"], fence("10:30:", 100))));
    until("the other waiting", || two.cache.stats().lease_waits.get() == 1).await;
    gate.go.add_permits(10);
    assert_eq!(text(&holder.await.unwrap()), "before", "this process has not heard of the commit");
    let outcome = told.await.unwrap();
    assert_eq!((text(&outcome), outcome.unwrap().source), ("after".to_owned(), Source::Computed));
}

#[tokio::test]
async fn leases_that_ran_out_do_not_pile_up() {
    let postgres = postgres().await;
    let left = "insert into walcast.cache_leases select int4send(n), 'dead', now() - interval '2 minutes' from generate_series(1, 500) n";
    postgres.execute(left).await.unwrap();
    let (w, gate) = (process(&postgres), Gate::new());
    gate.go.add_permits(1);
    reader_of("7", &w.cache, &gate, patient(), fresh("seven", fence("10:20:", 50))).await.unwrap().unwrap();
    until_released(&postgres).await;
}
