//! What leaves the cache table, when, and what is said of it.

mod common;

use common::{
    World, fence, key,
    l2::{flush, node, number, patient, postgres},
    told, value,
};
use walcast_cache::{AtLeast, Cleanup, L2Config, Reason};
use walcast_testkit::TestPostgres;

/// Rows `from` to `to` like the one of key `7`, with other columns where `set` says so.
async fn copies(postgres: &TestPostgres, namespace: &str, from: u32, to: u32, set: &str) {
    let names: Vec<String> = (from..=to).map(|name| name.to_string()).collect();
    let hashes: Vec<Vec<u8>> = names.iter().map(|name| key(&format!("{namespace}/{name}")).digest().to_vec()).collect();
    let client = postgres.connect().await.unwrap();
    let copy = "create temporary table copies as select c.* from walcast.cache_entries c where key = '7' limit 0";
    client.batch_execute(copy).await.unwrap();
    let fill = "insert into copies (hash, namespace, key) select h, $3, k from unnest($1::bytea[], $2::text[]) v (h, k)";
    client.execute(fill, &[&hashes, &names, &namespace]).await.unwrap();
    let of_seven =
        "value content_type tags epoch floor settled snapshot_xmax snapshot stored_at expires_at etag hits stale_until negative";
    let of_seven: Vec<String> = of_seven.split(' ').map(|column| format!("{column} = c.{column}")).collect();
    let sql = format!(
        "update copies set {} from walcast.cache_entries c where c.key = '7' and c.namespace = 'patients';
         {}; insert into walcast.cache_entries select * from copies",
        of_seven.join(", "),
        if set.is_empty() { String::new() } else { format!("update copies set {set}") }
    );
    client.batch_execute(&sql).await.unwrap();
}

async fn seven(postgres: &TestPostgres, config: L2Config) -> World {
    let w = node(postgres, config);
    w.put("7", "seven", &["patients:id=7"], fence("10:20:", 50));
    flush(&w).await;
    w
}

fn rows_of(done: &[Cleanup], reason: Reason) -> Option<u64> {
    done.iter().find(|cleanup| cleanup.reason == reason).map(|cleanup| cleanup.rows)
}

const COUNT: &str = "select count(*) from walcast.cache_entries";

#[tokio::test]
async fn a_clean_up_takes_all_that_is_over_but_waits_for_no_row_and_leaves_what_may_be_stale() {
    let postgres = postgres().await;
    let w = seven(&postgres, patient()).await;
    copies(&postgres, "patients", 1001, 3500, "expires_at = now() - interval '2 s', stale_until = now() - interval '1 s'").await;
    copies(&postgres, "patients", 4001, 4010, "expires_at = now() - interval '1 s', stale_until = now() + interval '1 h'").await;
    let mut other = postgres.connect().await.unwrap();
    let held = other.transaction().await.unwrap();
    held.batch_execute("select 1 from walcast.cache_entries where key = '1005' for update").await.unwrap();
    let done = w.cache.clean_up().await.unwrap();
    assert_eq!(rows_of(&done, Reason::Expired), Some(2499), "the held row is skipped: {done:?}");
    held.rollback().await.unwrap();
    assert_eq!(rows_of(&w.cache.clean_up().await.unwrap(), Reason::Expired), Some(1));
    assert_eq!(number(&postgres, COUNT).await, 11, "what may still be answered as stale stays");
}

#[tokio::test]
async fn a_reader_who_meets_a_row_that_is_over_deletes_nothing_and_upkeep_then_does() {
    let postgres = postgres().await;
    let w = seven(&postgres, patient()).await;
    copies(&postgres, "patients", 1, 3, "expires_at = now() - interval '2 s', stale_until = now() - interval '1 s'").await;
    for name in ["1", "2"] {
        assert_eq!(told(&w.cache.get(&key(name), AtLeast::Any).await), "miss expired");
    }
    assert_eq!(number(&postgres, COUNT).await, 4, "a read writes nothing");
    // Written anew since: not over any more.
    w.put("2", "anew", &[], fence("10:21:", 60));
    flush(&w).await;
    assert_eq!(rows_of(&w.cache.tidy().await.unwrap(), Reason::Expired), Some(1));
    let left = "select string_agg(key, ' ' order by key) from walcast.cache_entries";
    let left: String = postgres.connect().await.unwrap().query_one(left, &[]).await.unwrap().get(0);
    assert_eq!(left, "2 3 7", "only what was met; the rest waits for its hour");
    assert_eq!(w.cache.tidy().await.unwrap(), [], "nothing to do is not worth a line");
}

#[tokio::test]
async fn a_clean_up_takes_old_rows_that_nobody_asked_for_but_nothing_in_use_and_no_session() {
    let postgres = postgres().await;
    let w = seven(&postgres, patient()).await;
    let old = "stored_at = now() - interval '3 h', expires_at = now() + interval '1 h', stale_until = now() + interval '1 h'";
    copies(&postgres, "patients", 100, 1399, old).await;
    copies(&postgres, "patients", 2001, 2010, &format!("{old}, hits = 1")).await;
    copies(&postgres, "external", 3001, 3010, old).await;
    let young = "stored_at = now() - interval '3 h', expires_at = now() + interval '9 h', stale_until = now() + interval '9 h'";
    copies(&postgres, "patients", 4001, 4010, young).await;
    // As if L1 had kept it all the time: its readers never come to the table.
    postgres.execute("update walcast.cache_entries set stored_at = now() - interval '3 h' where key = '7'").await.unwrap();
    let done = w.cache.clean_up().await.unwrap();
    let more = w.cache.clean_up().await.unwrap();
    let unused: u64 = [done, more].iter().filter_map(|done| rows_of(done, Reason::Unused)).sum();
    assert_eq!(unused, 1300);
    assert_eq!(number(&postgres, COUNT).await, 31);
    let seven = "select hits from walcast.cache_entries where key = '7'";
    assert_eq!(number(&postgres, seven).await, 1, "what L1 holds counts as in use");
}

#[tokio::test]
async fn p7_the_byte_limit_is_enforced_and_what_brings_the_most_stays() {
    let postgres = postgres().await;
    let w = seven(&postgres, L2Config { max_bytes: 4 << 20, ..patient() }).await;
    postgres.execute("alter table walcast.cache_entries alter value set storage external").await.unwrap();
    let large = "value = decode(repeat('ab', 700), 'hex')";
    // 5,000 rows of about 1,050 bytes; a tenth of them with many hits.
    copies(&postgres, "patients", 10_000, 14_499, large).await;
    copies(&postgres, "patients", 20_000, 20_499, &format!("{large}, hits = 1000, last_hit_at = now()")).await;
    let before = w.cache.l2().unwrap().measure().await.unwrap();
    assert_eq!(before.rows, 5001, "so small a table is counted whole");
    assert!(before.bytes > 4 << 20 && before.file_bytes > before.bytes, "{before:?}");

    let done = w.cache.tidy().await.unwrap();
    let room = done.iter().find(|cleanup| cleanup.reason == Reason::Room).expect("room was made");
    let after = w.cache.l2().unwrap().size().unwrap();
    assert!(after.bytes <= 4 << 20, "{after:?}");
    assert!(after.bytes >= 3 << 20, "no more than needed: {after:?}");
    assert_eq!((before.rows - after.rows, before.bytes - after.bytes), (room.rows, room.bytes));
    assert_eq!(number(&postgres, "select count(*) from walcast.cache_entries where hits = 1000").await, 500);
    assert_eq!(told(&node(&postgres, patient()).cache.get(&key("7"), AtLeast::Any).await), "hit seven", "in L1: in use");
    assert_eq!(w.cache.stats().l2_cleaned_rows(Reason::Room).get(), room.rows);

    // The hourly one begins before the limit is met.
    let done = w.cache.clean_up().await.unwrap();
    assert!(rows_of(&done, Reason::LowValue).is_some_and(|rows| rows > 100), "{done:?}");
    assert!(w.cache.l2().unwrap().size().unwrap().bytes <= (4 << 20) / 10 * 8);
}

#[tokio::test]
async fn p7_the_byte_limit_holds_for_rows_of_security_contexts_too() {
    let postgres = postgres().await;
    let w = node(&postgres, patient());
    postgres.execute("alter table walcast.cache_entries alter value set storage external").await.unwrap();
    for n in 0..3_000_u32 {
        let key = key(&format!("k{n}")).in_context(u128::from(n));
        w.cache.put(&key, value(&"x".repeat(1_000), &[]), fence("10:20:", 50)).unwrap();
        if n % 500 == 0 {
            flush(&w).await;
        }
    }
    flush(&w).await;
    // Another node, with nothing in use in its L1.
    let keeper = node(&postgres, L2Config { max_bytes: 1 << 20, ..patient() });
    let done = keeper.cache.tidy().await.unwrap();
    let after = keeper.cache.l2().unwrap().measure().await.unwrap();
    assert!(after.rows > 0 && after.bytes <= 1 << 20, "{after:?}, {done:?}");
}

#[tokio::test]
async fn p7_a_large_table_is_measured_by_a_sample() {
    let postgres = postgres().await;
    let w = seven(&postgres, patient()).await;
    copies(&postgres, "patients", 100_000, 159_999, "tags = array[repeat('t', 400)]").await;
    let exact = "select sum(pg_column_size(value) + pg_column_size(tags) + pg_column_size(snapshot) + octet_length(key) + 256)::int8 \
                 from walcast.cache_entries";
    let exact = number(&postgres, exact).await as f64;
    let pages = "select pg_relation_size('walcast.cache_entries') / 8192";
    assert!(number(&postgres, pages).await > 3000, "three times what is read");
    let size = w.cache.l2().unwrap().measure().await.unwrap();
    let off = (size.bytes as f64 / exact - 1.0).abs();
    assert!(off < 0.25 && size.rows > 45_000, "{size:?}, and it is {exact}");
    assert_ne!(size.bytes as f64, exact, "a sample is never quite right: all of it was read");
}

#[tokio::test]
async fn p7_much_that_is_written_calls_for_upkeep_before_its_time() {
    let postgres = postgres().await;
    let w = node(&postgres, L2Config { max_bytes: 1 << 20, ..patient() });
    let l2 = w.cache.l2().unwrap();
    for n in 0..200 {
        w.put(&n.to_string(), &"x".repeat(1000), &[], fence("10:20:", 50));
    }
    let called = tokio::time::timeout(std::time::Duration::from_secs(60), l2.crowded());
    called.await.expect("200 KB of a limit of 1 MiB were written");
}

#[tokio::test]
async fn every_clean_up_is_in_the_log_and_in_the_statistics_of_its_day() {
    let postgres = postgres().await;
    let w = seven(&postgres, patient()).await;
    let l2 = w.cache.l2().unwrap();
    let over = "expires_at = now() - interval '2 s', stale_until = now() - interval '1 s'";
    for (from, to) in [(100, 149), (200, 229)] {
        copies(&postgres, "patients", from, to, over).await;
        w.cache.clean_up().await.unwrap();
    }
    w.cache.clean_up().await.unwrap();
    let lines = l2.last_cleanups(10).await.unwrap();
    let rows: Vec<_> = lines.iter().map(|line| (line.reason.as_str(), line.rows)).collect();
    assert_eq!(rows, [("expired", 0), ("expired", 30), ("expired", 50)], "a line each, the newest first");
    assert!(lines[2].bytes > 50 * 256 && lines[2].started_at.ends_with('Z'), "{lines:?}");
    let days = l2.cleanup_days().await.unwrap();
    let sum: u64 = lines.iter().map(|line| line.bytes).sum();
    assert!(days.iter().all(|day| day.reason == "expired"), "{days:?}");
    assert_eq!(days.iter().fold((0, 0, 0), |all, day| (all.0 + day.runs, all.1 + day.rows, all.2 + day.bytes)), (3, 80, sum));

    // What is older than 30 days leaves with the next line.
    postgres.execute("update walcast.cache_cleanups set started_at = now() - interval '31 days'").await.unwrap();
    w.cache.clean_up().await.unwrap();
    assert_eq!(l2.last_cleanups(10).await.unwrap().len(), 1);
}
