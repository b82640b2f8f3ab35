//! The cache table in a real PostgreSQL.

mod common;

use std::{
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use common::{
    World, computed, fence, key,
    l2::{flush, node, number, patient, postgres},
    told, world_with,
};
use walcast_cache::{AtLeast, CacheConfig, ComputeOptions, L2, L2Config, Lookup, Source, Tier};
use walcast_model::{Epoch, Lsn, Xid};
use walcast_pg::{ConnectConfig, Pool};
use walcast_testkit::Proxy;

async fn get(world: &World, name: &str) -> String {
    told(&world.cache.get(&key(name), AtLeast::Any).await)
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn after_a_restart_the_table_answers_what_no_commit_touched_meanwhile() {
    let postgres = postgres().await;
    let before = node(&postgres, patient());
    before.put("7", "seven, \"quoted\"\n\\", &["patients:id=7", "a"], fence("10:20:12,15", 0x16_0000_0050));
    before.put("8", "eight", &["patients:id=8"], fence("10:20:", 50));
    before.put("9", "nine", &[], fence("10:20:", 50));
    flush(&before).await;
    assert_eq!(before.cache.stats().l2_written.get(), 3);

    let after = node(&postgres, patient());
    after.commit(0x16_0000_0060, 20, &["patients:id=8"]);
    let Lookup::Hit { entry, tier: Tier::L2, stale: None } = after.cache.get(&key("7"), AtLeast::Any).await else {
        panic!("the table has it")
    };
    let there = before.cache.get(&key("7"), AtLeast::Any).await;
    let Lookup::Hit { entry: original, tier: Tier::L1, .. } = there else { panic!("L1 has it") };
    assert_eq!(format!("{entry:?}"), format!("{original:?}"), "all of it, fence and times included");
    assert_eq!(get(&after, "8").await, "miss invalidated");
    assert_eq!(get(&after, "7").await, "hit seven, \"quoted\"\n\\");
    assert_eq!((after.cache.stats().hits_l1.get(), after.cache.stats().hits_l2.get()), (1, 1), "moved up");

    // In one statement, in the order asked, one asked twice.
    let keys = ["9", "none", "7", "9", "8"].map(key);
    let told: Vec<_> = after.cache.get_many(&keys, AtLeast::Any).await.iter().map(told).collect();
    assert_eq!(told, ["hit nine", "miss absent", "hit seven, \"quoted\"\n\\", "hit nine", "miss invalidated"]);

    // Reads wrote nothing; upkeep brings the hits.
    assert_eq!(number(&postgres, "select sum(hits)::int8 from walcast.cache_entries").await, 0);
    after.cache.tidy().await.unwrap();
    assert_eq!(number(&postgres, "select sum(hits)::int8 from walcast.cache_entries").await, 3);

    let other_epoch = node(&postgres, patient());
    other_epoch.cache.set_epoch(Epoch(8));
    assert_eq!(get(&other_epoch, "7").await, "miss absent");
}

#[tokio::test]
async fn p5_the_table_never_goes_back_to_an_older_fence() {
    let postgres = postgres().await;
    let (a, b) = (node(&postgres, patient()), node(&postgres, patient()));
    let row = "select convert_from(value, 'UTF8') from walcast.cache_entries";
    let text = async || postgres.connect().await.unwrap().query_one(row, &[]).await.unwrap().get::<_, String>(0);
    a.put("7", "newer", &[], fence("10:30:", 0x1_0000_0000));
    flush(&a).await;
    for older in [fence("10:29:", 0x1_0000_0000), fence("10:99:", 0xFFFF_FFFF)] {
        // Another node, whose L1 knows nothing of the newer one.
        b.cache.clear_local();
        b.put("7", "older", &[], older);
        flush(&b).await;
        assert_eq!(text().await, "newer");
    }
    b.cache.clear_local();
    b.put("7", "same fence, later", &[], fence("10:30:", 0x1_0000_0000));
    flush(&b).await;
    assert_eq!(text().await, "same fence, later");
    b.cache.set_epoch(Epoch(9));
    b.put("7", "of another epoch", &[], fence("1:2:", 1));
    flush(&b).await;
    assert_eq!(text().await, "of another epoch");
    assert_eq!(b.cache.stats().l2_errors.get(), 0);
}

#[tokio::test]
async fn p3_a_row_found_by_its_hash_answers_only_its_own_full_key() {
    let postgres = postgres().await;
    let before = node(&postgres, patient());
    before.put("7", "seven", &[], fence("10:20:", 50));
    flush(&before).await;
    for wrong in ["key = '8'", "key = '7', namespace = 'other'"] {
        postgres.execute(&format!("update walcast.cache_entries set {wrong}")).await.unwrap();
        assert_eq!(get(&node(&postgres, patient()), "7").await, "miss absent", "{wrong}");
    }
    postgres.execute("update walcast.cache_entries set namespace = 'patients', snapshot = 'garbage'; ").await.unwrap();
    postgres.execute("update walcast.cache_entries set key = '7'").await.unwrap();
    let after = node(&postgres, patient());
    assert_eq!(get(&after, "7").await, "miss absent", "what cannot be judged is not answered");
    assert_eq!(after.cache.stats().l2_errors.get(), 1);
}

#[tokio::test]
async fn p6_with_the_table_away_readers_are_unharmed_and_what_it_missed_never_comes_back_as_fresh() {
    let postgres = postgres().await;
    let w = node(&postgres, L2Config { write_timeout: Duration::from_secs(2), ..L2Config::default() });
    w.put("7", "old", &["patients:id=7"], fence("10:20:", 50));
    flush(&w).await;
    postgres.stop_immediate().await.unwrap();

    for n in 0..5 {
        assert_eq!(get(&w, &format!("absent {n}")).await, "miss absent");
    }
    let l2 = w.cache.l2().unwrap();
    assert!(l2.is_away(), "open after five errors in a row");
    let errors = w.cache.stats().l2_errors.get();
    assert_eq!(get(&w, "another").await, "miss absent");
    assert_eq!((w.cache.stats().l2_errors.get(), w.cache.stats().l2_skipped.get() > 0), (errors, true), "not even asked");
    w.put("8", "in L1", &[], fence("10:20:", 50));
    assert_eq!(get(&w, "8").await, "hit in L1");
    let compute = || async { Ok::<_, String>(computed("computed", &[], fence("10:20:", 50))) };
    let answer = w.cache.get_or_compute(&key("9"), &ComputeOptions::default(), compute).await.unwrap();
    assert_eq!((&answer.entry.value[..], answer.source), (&b"computed"[..], Source::Computed));

    w.commit(100, 20, &["patients:id=7"]);
    w.cache.clear_local();
    postgres.start_again().await.unwrap();
    // An immediate stop empties the unlogged table; put the old row back as if it had stayed.
    let stale = node(&postgres, patient());
    stale.put("7", "old", &["patients:id=7"], fence("10:20:", 50));
    flush(&stale).await;
    until("the breaker closing", async || {
        get(&w, "absent").await;
        !l2.is_away()
    })
    .await;
    until("the row being judged", async || get(&w, "7").await == "miss invalidated").await;
}

#[tokio::test]
async fn p6_a_slow_table_is_skipped_in_time() {
    let postgres = postgres().await;
    let w = node(&postgres, L2Config { read_timeout: Duration::from_millis(100), ..L2Config::default() });
    let mut other = postgres.connect().await.unwrap();
    let lock = other.transaction().await.unwrap();
    lock.batch_execute("lock table walcast.cache_entries in access exclusive mode").await.unwrap();
    let began = Instant::now();
    for _ in 0..8 {
        assert_eq!(get(&w, "7").await, "miss absent");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!((w.cache.stats().l2_errors.get(), w.cache.stats().l2_skipped.get()), (5, 3));
}

#[tokio::test]
async fn p6_a_row_that_somebodys_transaction_holds_is_left_alone_and_the_table_is_not_given_up() {
    let postgres = postgres().await;
    let world = node(&postgres, patient());
    world.put("held", "old", &[], fence("10:20:", 50));
    flush(&world).await;
    let holder = postgres.connect().await.unwrap();
    holder.batch_execute("begin; select from walcast.cache_entries for update").await.unwrap();
    for n in 0..8 {
        world.put("held", &format!("new {n}"), &[], fence("10:20:", 60 + n));
        flush(&world).await;
    }
    assert!(!world.cache.l2().unwrap().is_away(), "a lock says nothing about the table");
    let stats = world.cache.stats();
    assert_eq!((stats.l2_errors.get(), stats.l2_dropped.get()), (0, 8));
    world.put("free", "written", &[], fence("10:20:", 70));
    flush(&world).await;
    holder.batch_execute("rollback").await.unwrap();
    let after = node(&postgres, patient());
    assert_eq!(get(&after, "free").await, "hit written");
}

#[tokio::test]
async fn p6_what_an_open_transaction_sets_from_sql_costs_its_neighbours_in_the_batch_nothing() {
    let postgres = postgres().await;
    let world = node(&postgres, patient());
    world.put("changed", "old", &[], fence("10:20:", 50));
    flush(&world).await;
    // As `walcast.cache_set` does it: the key's advisory lock, then the row, which of a new key nobody else sees yet.
    let setter = postgres.connect().await.unwrap();
    let set = |key: &str| {
        let hash = common::key(key).digest().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        format!(
            "select pg_advisory_xact_lock(hashtextextended('walcast/patients/{key}' collate \"C\", 3));
             insert into walcast.cache_entries as c (hash, namespace, key, value, content_type, tags, epoch, floor, settled, snapshot_xmax,
                                                     snapshot, stored_at, expires_at, stale_until, negative, etag)
             values ('\\x{hash}', 'patients', '{key}', 'of SQL', 'text/plain', '{{}}', '00000007', (select max(floor) from walcast.cache_entries), '0/60', 20, '10:20:', now(),
                     now() + interval '1 hour', now() + interval '1 hour', false, '\"x\"')
             on conflict (hash) do update set value = excluded.value, settled = excluded.settled;"
        )
    };
    setter.batch_execute(&format!("begin; {} {}", set("changed"), set("made"))).await.unwrap();
    for key in ["a", "changed", "b", "made", "c"] {
        world.put(key, "ours", &[], fence("10:20:", 50));
    }
    flush(&world).await;
    let stats = world.cache.stats();
    assert_eq!((stats.l2_written.get(), stats.l2_dropped.get(), stats.l2_errors.get()), (1 + 3, 2, 0));
    setter.batch_execute("commit").await.unwrap();
    let after = node(&postgres, patient());
    for (key, value) in [("a", "ours"), ("b", "ours"), ("c", "ours"), ("changed", "of SQL"), ("made", "of SQL")] {
        assert_eq!(get(&after, key).await, format!("hit {value}"), "{key}");
    }
}

#[tokio::test]
async fn p7_writes_go_in_batches_and_a_full_queue_drops_and_counts() {
    let postgres = postgres().await;
    let w = node(&postgres, L2Config { queue_bytes: 100_000, ..patient() });
    let transactions = "select count(distinct xmin::text)::int8 from walcast.cache_entries";
    // One thread: nothing is written before all are queued.
    for n in 0..100 {
        w.put(&n.to_string(), "value", &["patients"], fence("10:20:", 50));
    }
    // The same key again and again is one row, the last.
    for n in 100..110 {
        w.put("0", &n.to_string(), &["patients"], fence(&format!("10:{n}:"), 50));
    }
    w.put("large", &"x".repeat(100_000), &[], fence("10:20:", 50));
    assert_eq!(w.cache.stats().l2_dropped.get(), 1);
    flush(&w).await;
    assert_eq!(w.cache.stats().l2_written.get(), 100);
    assert_eq!(number(&postgres, transactions).await, 1, "110 writes, one transaction");
    assert_eq!(get(&node(&postgres, patient()), "0").await, "hit 109");
    assert_eq!(get(&w, "large").await.len(), 100_004, "still in L1");

    let narrow = node(&postgres, L2Config { queue_items: 10, ..patient() });
    for n in 0..30 {
        narrow.put(&format!("narrow {n}"), "value", &[], fence("10:20:", 50));
    }
    assert_eq!(narrow.cache.stats().l2_dropped.get(), 20);
}

#[tokio::test]
async fn p3_nobody_else_may_read_the_table() {
    let postgres = postgres().await;
    postgres.execute("create role anon").await.unwrap();
    let rights = "select count(*) from unnest(array['select','insert','update','delete','truncate']) p \
                  where has_table_privilege('anon', 'walcast.cache_entries', p)";
    assert_eq!(number(&postgres, rights).await, 0);
    assert_eq!(
        number(&postgres, "select count(*) from pg_class where relname = 'cache_entries' and relpersistence = 'u'").await,
        1
    );
}

#[tokio::test]
async fn computing_reads_the_table_first() {
    let postgres = postgres().await;
    let before = node(&postgres, patient());
    before.put("7", "seven", &["patients:id=7"], fence("10:20:", 50));
    flush(&before).await;
    let compute = || async { Ok::<_, String>(computed("computed", &["patients:id=7"], fence("10:30:", 100))) };
    let after = node(&postgres, patient());
    let asked = ComputeOptions { timeout: Duration::from_secs(20), ..ComputeOptions::default() };
    let answer = after.cache.get_or_compute(&key("7"), &asked, compute).await.unwrap();
    assert_eq!((&answer.entry.value[..], answer.source), (&b"seven"[..], Source::Tier(Tier::L2)));

    let after = node(&postgres, patient());
    let newer = ComputeOptions { at_least: AtLeast::Xid(Xid(25)), ..asked.clone() };
    assert_eq!(after.cache.get_or_compute(&key("7"), &newer, compute).await.unwrap().source, Source::Computed);

    let after = node(&postgres, patient());
    after.commit(120, 40, &["patients:id=7"]);
    assert_eq!(after.cache.invalidated_to(), Lsn(120));
    assert_eq!(after.cache.get_or_compute(&key("7"), &asked, compute).await.unwrap().source, Source::Computed);
}

#[tokio::test]
async fn p6_a_crowded_pool_says_nothing_about_the_table_and_a_silent_server_does() {
    let postgres = postgres().await;
    let proxy = Proxy::to(postgres.port()).await.unwrap();
    let url = postgres.url().replace(&postgres.port().to_string(), &proxy.port().to_string());
    let pool = Pool::new(&ConnectConfig::parse(&url).unwrap(), 2, Duration::from_secs(5)).unwrap().direct();
    let config = L2Config { read_timeout: Duration::from_millis(100), ..L2Config::default() };
    let w = world_with(CacheConfig::default(), Some(L2::start(pool.clone(), config)));
    w.put("7", "seven", &[], fence("10:20:", 50));
    flush(&w).await;
    w.cache.clear_local();

    // Queries hold every connection for as long as they take.
    let held = [pool.lease("a slow query").await.unwrap(), pool.lease("a slow query").await.unwrap()];
    for _ in 0..6 {
        assert_eq!(get(&w, "7").await, "miss absent");
    }
    let stats = w.cache.stats();
    assert_eq!((stats.l2_errors.get(), stats.l2_skipped.get()), (0, 6));
    assert!(!w.cache.l2().unwrap().is_away());
    drop(held);
    assert_eq!(get(&w, "7").await, "hit seven", "the tier is there the moment that a connection is");

    // Control: with the server silent the connections are not merely lent, though no more come free.
    w.cache.clear_local();
    proxy.pause();
    for _ in 0..6 {
        assert_eq!(get(&w, "7").await, "miss absent");
    }
    assert!(w.cache.l2().unwrap().is_away());
}

/// Of values with equal fences the later one is the newer: in memory and in the table alike.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn p4_of_two_puts_at_once_the_table_keeps_the_one_that_memory_keeps() {
    const KEYS: usize = 2_000;
    const WRITERS: usize = 8;
    let postgres = postgres().await;
    let config = L2Config { queue_items: KEYS * WRITERS, queue_bytes: 256 << 20, ..patient() };
    let w = Arc::new(node(&postgres, config));
    let together = Arc::new(Barrier::new(WRITERS));
    let writers = (0..WRITERS).map(|writer| {
        let (w, together) = (w.clone(), together.clone());
        std::thread::spawn(move || {
            for n in 0..KEYS {
                together.wait();
                w.put(&format!("k{n}"), &format!("by {writer}"), &[], fence("10:20:", 50));
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    flush(&w).await;
    assert_eq!(w.cache.stats().l2_dropped.get(), 0);
    let keys: Vec<_> = (0..KEYS).map(|n| key(&format!("k{n}"))).collect();
    let in_memory: Vec<String> = w.cache.get_many(&keys, AtLeast::Any).await.iter().map(told).collect();
    w.cache.clear_local();
    let in_table: Vec<String> = w.cache.get_many(&keys, AtLeast::Any).await.iter().map(told).collect();
    let other = (0..KEYS).filter(|n| in_memory[*n] != in_table[*n]).count();
    assert_eq!(other, 0, "a replaced value would come back when memory lets the new one go");
}
