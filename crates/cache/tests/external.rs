//! Values that no commit speaks of, in memory over PostgreSQL: what was answered as stored is there after a restart, and the
//! value before it never comes back, whatever goes wrong on the way.

mod common;

use std::time::Duration;

use common::{
    World, computed,
    l2::{node, node_at, number, patient, postgres},
    readers::{options, until},
    refusal, told, value,
};
use walcast_cache::{AtLeast, Cache, CacheConfig, Hearing, L2Config, NewEntry, Precondition, PutError, Refusal, Source, Stored};
use walcast_model::{CacheKey, Epoch};
use walcast_testkit::{Proxy, TestPostgres};

const ROW: &str = "update walcast.cache_entries set hits = hits where key = 'session'";

fn session() -> CacheKey {
    common::key("external/session")
}

async fn put(cache: &Cache, text: &str) -> Option<Refusal> {
    refusal(&cache.put_if(&session(), value(text, &["user:ann"]), cache.external_fence(), &Precondition::None).await.unwrap())
}

async fn get(cache: &Cache) -> String {
    told(&cache.get(&session(), AtLeast::Any).await)
}

/// What a Walcast finds that starts with this clock: empty memory, the table as it is.
async fn after_restart(postgres: &TestPostgres, w: &World) -> String {
    let l2 = node(postgres, patient()).cache.l2().cloned();
    let mut config = CacheConfig::default();
    config.namespaces.insert("external".into(), w.cache.config().namespaces["external"].clone());
    let cache = Cache::new(config, w.clock.clone(), l2);
    cache.set_hearing(Hearing::Live);
    cache.set_epoch(Epoch(7));
    get(&cache).await
}

fn impatient() -> L2Config {
    L2Config { write_timeout: Duration::from_millis(300), ..patient() }
}

#[tokio::test]
async fn what_was_stored_is_there_after_a_restart_and_the_last_one_of_it() {
    let postgres = postgres().await;
    let w = node(&postgres, patient());
    w.commit(100, 20, &[]);
    for text in ["one", "two", "three"] {
        assert_eq!(put(&w.cache, text).await, None);
        assert_eq!((get(&w.cache).await, after_restart(&postgres, &w).await), (format!("hit {text}"), format!("hit {text}")));
    }
    w.commit(200, 21, &["user:ann"]);
    assert_eq!(get(&w.cache).await, "miss invalidated");
    assert_eq!(after_restart(&postgres, &w).await, "miss invalidated", "the row is judged by the clock like any other");
    assert_eq!(put(&w.cache, "four").await, None);
    assert_eq!(after_restart(&postgres, &w).await, "hit four");
}

#[tokio::test]
async fn of_puts_that_race_both_tiers_have_the_same_winner() {
    let postgres = postgres().await;
    let w = node(&postgres, patient());
    for round in 0..20 {
        let puts: Vec<_> = (0..8)
            .map(|n| {
                let cache = w.cache.clone();
                tokio::spawn(async move { put(&cache, &format!("{round} {n}")).await })
            })
            .collect();
        // The stream goes on, so that their fences differ.
        w.commit(100 * (round + 1), 20, &[]);
        for put in puts {
            assert!(matches!(put.await.unwrap(), None | Some(Refusal::Older)));
        }
        let in_memory = get(&w.cache).await;
        assert!(in_memory.starts_with(&format!("hit {round} ")), "{in_memory}");
        assert_eq!(after_restart(&postgres, &w).await, in_memory);
    }
}

#[tokio::test]
async fn of_puts_that_are_run_in_another_order_the_one_that_came_last_stays() {
    let postgres = postgres().await;
    for w in [node(&postgres, patient()), common::world()] {
        let places = [w.cache.arrive(&session()), w.cache.arrive(&session()), w.cache.arrive(&session())];
        let mut places = places.into_iter().zip(["first", "second", "third"]).collect::<Vec<_>>();
        places.swap(0, 1);
        let mut outcomes = Vec::new();
        for (arrival, text) in places {
            let put = w.cache.put_external(arrival, &session(), value(text, &[]), &Precondition::None).await;
            outcomes.push(refusal(&put.unwrap()));
        }
        assert_eq!(outcomes, [None, Some(Refusal::Older), None]);
        assert_eq!(get(&w.cache).await, "hit third");
    }
}

/// How a put is not confirmed, and what the table then holds.
#[tokio::test]
async fn a_put_that_is_not_confirmed_says_so_and_what_was_before_never_comes_back() {
    let postgres = postgres().await;
    for how in ["silent", "cut", "refused", "locked", "full", "gone"] {
        postgres.execute("truncate walcast.cache_entries").await.unwrap();
        let proxy = Proxy::to(postgres.port()).await.unwrap();
        let w = node_at(&postgres.url_through(&proxy), if how == "locked" { patient() } else { impatient() });
        w.commit(100, 20, &[]);
        assert_eq!(put(&w.cache, "before").await, None, "{how}");
        let mut locked = postgres.connect().await.unwrap();
        let mut full = None;
        let lock = match how {
            "locked" => {
                let lock = locked.transaction().await.unwrap();
                lock.execute(ROW, &[]).await.unwrap();
                Some(lock)
            }
            _ => None,
        };
        match how {
            "silent" | "gone" => proxy.pause(),
            "cut" => proxy.cut(),
            "refused" => proxy.refuse(),
            "full" => {
                let l2 = node_at(&postgres.url(), L2Config { queue_bytes: 1, ..patient() }).cache.l2().cloned();
                let config = w.cache.config().clone();
                let narrow = Cache::new(config, w.clock.clone(), l2);
                narrow.set_hearing(Hearing::Live);
                narrow.set_epoch(Epoch(7));
                narrow.note_invalidated(w.cache.invalidated_to());
                full = Some(narrow);
            }
            _ => {}
        }
        let cache = full.as_ref().unwrap_or(&w.cache);
        let outcome = if how == "gone" {
            // Its caller goes while it waits.
            let put = tokio::time::timeout(Duration::from_millis(50), put(cache, "after"));
            assert!(put.await.is_err());
            Some(Refusal::L2Away)
        } else {
            put(cache, "after").await
        };
        // A connection that was cut is made again in time, if it was lost before the statement.
        if how == "cut" && outcome.is_none() {
            continue;
        }
        assert_eq!(outcome, Some(Refusal::L2Away), "{how}");
        drop(lock);
        proxy.resume();
        assert_eq!(get(cache).await, "miss invalidated", "{how}");
        assert_eq!(after_restart(&postgres, &w).await, "miss invalidated", "{how}: the table has a row");

        // Control: to a clock that does not know of it, the table answers the value before, or the one that was refused.
        let forgetful = node(&postgres, patient());
        let came_back = get(&forgetful.cache).await;
        assert!(came_back == "hit before" || came_back == "hit after", "{how}: {came_back}");

        assert_eq!(put(cache, "at once").await, Some(Refusal::L2Away), "{how}: nothing tells it from what may come late");
        for cache in [cache, &w.cache] {
            cache.note_invalidated(walcast_model::Lsn(200));
        }
        until("L2 is asked again", || !cache.l2().unwrap().is_away()).await;
        if how == "full" {
            continue;
        }
        assert_eq!(put(cache, "anew").await, None, "{how}");
        assert_eq!((get(cache).await, after_restart(&postgres, &w).await), ("hit anew".into(), "hit anew".into()), "{how}");
    }
}

#[tokio::test]
async fn what_is_refused_while_the_stream_is_lost_ends_what_was_before_too() {
    let postgres = postgres().await;
    let w = node(&postgres, patient());
    w.commit(100, 20, &[]);
    assert_eq!(put(&w.cache, "before").await, None);
    w.cache.set_hearing(Hearing::Lost { since_ms: 1 });
    assert_eq!(put(&w.cache, "after").await, Some(Refusal::NotHearing));
    w.cache.set_hearing(Hearing::Live);
    assert_eq!(get(&w.cache).await, "miss invalidated");
    assert_eq!(after_restart(&postgres, &w).await, "miss invalidated");
}

#[tokio::test]
async fn a_precondition_looks_into_both_tiers_and_refused_by_it_nothing_changes() {
    let postgres = postgres().await;
    let w = node(&postgres, patient());
    let put_if = async |text: &str, precondition: Precondition| {
        refusal(&w.cache.put_if(&session(), value(text, &[]), w.cache.external_fence(), &precondition).await.unwrap())
    };
    assert_eq!(put_if("none", Precondition::Present).await, Some(Refusal::Precondition));
    assert_eq!(put_if("one", Precondition::Absent).await, None);
    for forget in [false, true] {
        if forget {
            w.cache.clear_local();
        }
        assert_eq!(put_if("two", Precondition::Absent).await, Some(Refusal::Precondition), "forgotten: {forget}");
        assert_eq!(get(&w.cache).await, "hit one");
    }
}

#[tokio::test]
async fn many_together_soon_and_computed_they_all_reach_the_table() {
    let postgres = postgres().await;
    let w = node(&postgres, patient());
    let entry = |n: u32| NewEntry {
        key: common::key(&format!("external/{n}")),
        value: value(&n.to_string(), &[]),
        fence: w.cache.external_fence(),
    };
    let outcomes = w.cache.put_many((0..50).map(entry)).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(Stored::Yes { .. }))));
    let count = "select count(*) from walcast.cache_entries";
    assert_eq!(number(&postgres, count).await, 50, "when it is answered it is there");
    w.cache.put_soon(entry(50));
    until("the one that nobody waits for", || w.cache.stats().l2_written.get() == 51).await;
    let fence = w.cache.external_fence();
    let compute = move || std::future::ready(Ok::<_, String>(computed("computed", &[], fence.clone())));
    let answer = w.cache.get_or_compute(&session(), &options(), compute).await.unwrap();
    assert_eq!((answer.source, answer.refusal), (Source::Computed, None));
    assert_eq!(number(&postgres, count).await, 52);
    assert_eq!(after_restart(&postgres, &w).await, "hit computed");
    let at_once = w.cache.put(&session(), value("x", &[]), w.cache.external_fence());
    assert_eq!(at_once.unwrap_err(), PutError::MustWait("external".into()));
}

#[tokio::test]
async fn what_was_computed_before_a_put_does_not_take_its_place() {
    let postgres = postgres().await;
    let w = node(&postgres, patient());
    let (cache, gate) = (w.cache.clone(), common::readers::Gate::new());
    let fence = w.cache.external_fence();
    let passing = gate.clone();
    let computing = tokio::spawn(async move {
        let compute = move || {
            let (passing, fence) = (passing.clone(), fence.clone());
            async move {
                passing.pass().await;
                Ok::<_, String>(computed("read before", &[], fence))
            }
        };
        cache.get_or_compute(&session(), &options(), compute).await
    });
    until("it computes", || gate.begun() == 1).await;
    assert_eq!(put(&w.cache, "put meanwhile").await, None);
    gate.go.add_permits(1);
    assert_eq!(computing.await.unwrap().unwrap().refusal, Some(Refusal::Older));
    assert_eq!(
        (get(&w.cache).await, after_restart(&postgres, &w).await),
        ("hit put meanwhile".into(), "hit put meanwhile".into())
    );
}

#[tokio::test]
async fn p7_what_waits_to_be_stored_is_bounded_in_number_and_bytes() {
    let w = common::world_with(CacheConfig { max_soon: 2, max_soon_bytes: 10, ..CacheConfig::default() }, None);
    let (first, second) = (w.cache.soon_room(4).unwrap(), w.cache.soon_room(4).unwrap());
    assert!(w.cache.soon_room(1).is_none(), "two are too many");
    drop(second);
    assert!(w.cache.soon_room(7).is_none(), "too large beside the first");
    w.cache.soon(w.cache.soon_room(6).unwrap(), std::future::ready(3));
    until("that one is over", || w.cache.stats().puts_failed.get() == 3).await;
    until("its room is free", || w.cache.soon_room(6).is_some()).await;
    drop(first);
}
