//! Values that are old, or that are not there: what is answered all the same, and what goes on in the background.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::{
    World, computed, fence, key,
    readers::{Gate, Outcome, fresh, options, reader_of, text, until},
    refusal, tag, told, value, world_with,
};
use tokio::sync::Semaphore;
use walcast_cache::{
    AtLeast, CacheConfig, ComputeError, ComputeOptions, Computed, Hearing, Lookup, NamespaceConfig, NewEntry, NewValue,
    Preloaded, PutError, Refusal, Source, Stale, Stored,
};
use walcast_model::{Fence, Lsn, Stamp, Tag, Xid};

const HOUR: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_millis(20);

/// `plain`, `grace`, `swr`: values of a second, and what is done with them then. `all`: both, also for what a commit
/// invalidated. `nothing`: keeps for a second that there is nothing. `ahead`: computes anew before the end.
fn world() -> World {
    world_of(CacheConfig::default())
}

fn world_of(mut config: CacheConfig) -> World {
    let plain = NamespaceConfig { ttl: Some(SHORT), ..NamespaceConfig::default() };
    let grace = NamespaceConfig { grace: HOUR, ..plain.clone() };
    let swr = NamespaceConfig { stale_while_revalidate: HOUR, ..plain.clone() };
    let all = NamespaceConfig { grace: HOUR, serve_invalidated: true, ..swr.clone() };
    let nothing = NamespaceConfig { ttl: Some(HOUR), negative_ttl: Some(SHORT), grace: HOUR, ..NamespaceConfig::default() };
    let ahead = NamespaceConfig { ttl: Some(Duration::from_secs(4)), refresh_ahead: Some(0.0), ..NamespaceConfig::default() };
    let named = [("plain", plain), ("grace", grace), ("swr", swr), ("all", all), ("nothing", nothing), ("ahead", ahead)];
    config.namespaces.extend(named.map(|(name, namespace)| (name.to_owned(), namespace)));
    world_with(config, None)
}

fn early() -> Fence {
    fence("10:20:", 50)
}

fn failing() -> Result<Computed, String> {
    Err("the database is away".to_owned())
}

/// Puts a value and waits until its time is over.
async fn old(w: &World, name: &str) {
    assert_eq!(refusal(&w.put(name, "old", &["patients:id=7"], early())), None);
    over(w, name).await;
}

async fn over(w: &World, name: &str) {
    let wait = async {
        while told(&w.cache.get(&key(name), AtLeast::Any).await).starts_with("hit") {
            tokio::time::sleep(SOON).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("the value's time is never over");
}

fn stale(outcome: &Outcome) -> Option<Stale> {
    outcome.as_ref().unwrap().stale
}

fn unsecured() -> ComputeOptions {
    ComputeOptions { grace: true, ..options() }
}

#[tokio::test]
async fn when_computing_fails_an_old_value_is_answered_where_the_namespace_has_a_grace() {
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(100);
    for (name, answered) in [("plain/7", false), ("grace/7", true)] {
        old(&w, name).await;
        let outcome = reader_of(name, &w.cache, &gate, options(), failing).await.unwrap();
        assert_eq!(outcome.is_ok(), answered, "{name}");
        if answered {
            assert_eq!((text(&outcome), stale(&outcome)), ("old".to_owned(), Some(Stale::Grace)));
        }
    }
    w.commit(100, 20, &["patients:id=7"]);
    let touched = reader_of("grace/7", &w.cache, &gate, unsecured(), failing).await.unwrap();
    assert_eq!(touched.unwrap_err(), ComputeError::Failed("the database is away".to_owned()), "a commit touched it");
}

#[tokio::test]
async fn p3_under_row_security_what_a_commit_may_have_hidden_is_not_answered_in_grace() {
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(100);
    old(&w, "all/7").await;
    w.cache.set_hearing(Hearing::Lost { since_ms: 1 });
    let outcome = reader_of("all/7", &w.cache, &gate, options(), failing).await.unwrap();
    assert!(outcome.is_err(), "not hearing, nobody knows what a commit hid");
    let outcome = reader_of("all/7", &w.cache, &gate, unsecured(), failing).await.unwrap();
    assert_eq!(stale(&outcome), Some(Stale::Grace), "nobody's rows are hidden");
    w.cache.set_hearing(Hearing::Live);
    w.commit(100, 20, &["patients:id=7"]);
    assert!(
        reader_of("all/7", &w.cache, &gate, ComputeOptions { soft_timeout: Some(SOON), ..options() }, failing)
            .await
            .unwrap()
            .is_err()
    );
    assert!(reader_of("all/7", &w.cache, &gate, unsecured(), failing).await.unwrap().is_ok());
}

#[tokio::test]
async fn while_it_is_computed_anew_all_are_answered_the_old_value_and_one_computation_runs() {
    let (w, gate) = (world(), Gate::new());
    old(&w, "swr/7").await;
    for _ in 0..100 {
        let outcome = reader_of("swr/7", &w.cache, &gate, options(), fresh("new", early())).await.unwrap();
        assert_eq!((text(&outcome), stale(&outcome)), ("old".to_owned(), Some(Stale::Revalidate)));
    }
    until("the computation in the background", || gate.begun() == 1).await;
    gate.go.add_permits(1);
    until("the landing", || w.cache.flights_aloft() == 0).await;
    assert_eq!(told(&w.cache.get(&key("swr/7"), AtLeast::Any).await), "hit new");
    assert_eq!((gate.begun(), w.cache.stats().refreshes.get(), w.cache.stats().refresh_errors.get()), (1, 1, 0));
}

#[tokio::test]
async fn p5_a_computation_in_the_background_stores_nothing_that_a_commit_touched_meanwhile() {
    let (w, gate) = (world(), Gate::new());
    old(&w, "swr/7").await;
    let outcome = reader_of("swr/7", &w.cache, &gate, options(), fresh("read before the commit", early())).await.unwrap();
    assert_eq!(text(&outcome), "old");
    until("the computation in the background", || gate.begun() == 1).await;
    w.commit(100, 20, &["patients:id=7"]);
    gate.go.add_permits(1);
    until("the landing", || w.cache.flights_aloft() == 0).await;
    assert_eq!(w.cache.stats().refusals(Refusal::Touched).get(), 1);
    assert_eq!(told(&w.cache.get(&key("swr/7"), AtLeast::Any).await), "miss expired", "nor is the old one answered now");
}

#[tokio::test]
async fn p6_what_fails_in_the_background_is_counted_and_nobody_hears_of_it() {
    let w = world();
    for (name, answer) in [("swr/7", failing as fn() -> Result<Computed, String>), ("swr/8", || panic!("a bug"))] {
        let gate = Gate::new();
        gate.go.add_permits(1);
        old(&w, name).await;
        let failed = w.cache.stats().refresh_errors.get();
        let outcome = reader_of(name, &w.cache, &gate, options(), answer).await.unwrap();
        assert_eq!(stale(&outcome), Some(Stale::Revalidate));
        until("the failure", || w.cache.stats().refresh_errors.get() == failed + 1 && w.cache.flights_aloft() == 0).await;
        let again = reader_of(name, &w.cache, &gate, options(), answer).await.unwrap();
        assert_eq!((stale(&again), gate.begun()), (Some(Stale::Revalidate), 1), "not tried again at once");
    }
}

#[tokio::test]
async fn p7_past_its_bound_nothing_more_is_begun_in_the_background_and_that_is_counted() {
    let (w, gate) = (world_of(CacheConfig { max_background: 1, ..CacheConfig::default() }), Gate::new());
    w.put("swr/8", "old", &[], early());
    old(&w, "swr/7").await;
    over(&w, "swr/8").await;
    for name in ["swr/7", "swr/8"] {
        let outcome = reader_of(name, &w.cache, &gate, options(), fresh("new", early())).await.unwrap();
        assert_eq!(stale(&outcome), Some(Stale::Revalidate));
    }
    assert_eq!((w.cache.stats().refreshes.get(), w.cache.stats().refreshes_full.get()), (1, 1));
    until("the first one", || gate.begun() == 1).await;
    gate.go.add_permits(2);
    until("its landing", || w.cache.flights_aloft() == 0).await;
    let mut outcomes = Vec::new();
    while w.cache.stats().refreshes.get() < 2 {
        outcomes.push(reader_of("swr/8", &w.cache, &gate, options(), fresh("new", early())).await.unwrap());
        assert!(outcomes.len() < 100_000, "the room is never free again");
    }
}

#[tokio::test]
async fn p9_work_in_the_background_ends_with_the_cache() {
    struct Ended(Arc<AtomicBool>);
    impl Drop for Ended {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let (w, begun, ended) = (world(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    old(&w, "swr/7").await;
    let compute = {
        let (begun, ended) = (begun.clone(), ended.clone());
        move || {
            let ended = Ended(ended.clone());
            begun.fetch_add(1, Ordering::SeqCst);
            async move {
                let _ended = ended;
                std::future::pending::<Result<Computed, String>>().await
            }
        }
    };
    let answer = w.cache.get_or_compute(&key("swr/7"), &options(), compute).await.unwrap();
    assert_eq!(answer.stale, Some(Stale::Revalidate));
    until("the computation", || begun.load(Ordering::SeqCst) == 1).await;
    assert!(!ended.load(Ordering::SeqCst));
    drop(w);
    until("its end", || ended.load(Ordering::SeqCst)).await;
}

#[tokio::test]
async fn a_soft_timeout_answers_stale_and_the_late_value_is_stored() {
    let (w, gate) = (world(), Gate::new());
    old(&w, "grace/7").await;
    let hasty = ComputeOptions { soft_timeout: Some(SOON), ..options() };
    let mut outcomes = Vec::new();
    for _ in 0..3 {
        outcomes.push(reader_of("grace/7", &w.cache, &gate, hasty.clone(), fresh("late", early())).await.unwrap());
    }
    for outcome in outcomes {
        assert_eq!((text(&outcome), stale(&outcome)), ("old".to_owned(), Some(Stale::SoftTimeout)));
    }
    assert_eq!((gate.begun(), w.cache.flights_aloft()), (1, 1), "it goes on, and the others waited for it");
    gate.go.add_permits(1);
    until("the landing", || w.cache.flights_aloft() == 0).await;
    assert_eq!(told(&w.cache.get(&key("grace/7"), AtLeast::Any).await), "hit late");
    assert_eq!(w.cache.stats().soft_timeouts.get(), 3);
}

#[tokio::test]
async fn after_a_soft_timeout_a_reader_waits_where_nothing_old_may_be_answered_or_nothing_more_can_run() {
    let (w, gate) = (world_of(CacheConfig { max_background: 0, ..CacheConfig::default() }), Gate::new());
    old(&w, "grace/7").await;
    old(&w, "plain/7").await;
    let hasty = ComputeOptions { soft_timeout: Some(SOON), ..options() };
    let readers = ["grace/7", "plain/7"].map(|name| reader_of(name, &w.cache, &gate, hasty.clone(), fresh("late", early())));
    until("both computations", || gate.begun() == 2).await;
    until("the bound", || w.cache.stats().refreshes_full.get() == 1).await;
    gate.go.add_permits(2);
    for reader in readers {
        let outcome = reader.await.unwrap();
        assert_eq!((text(&outcome), stale(&outcome)), ("late".to_owned(), None));
    }
}

#[tokio::test]
async fn p4_a_reader_who_asked_for_at_least_this_fresh_or_for_a_new_value_is_never_answered_stale() {
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(100);
    old(&w, "all/7").await;
    w.commit(100, 20, &["patients:id=7"]);
    let asked = [
        ComputeOptions { at_least: AtLeast::Xid(Xid(1)), ..unsecured() },
        ComputeOptions { at_least: AtLeast::Lsn(Lsn(100)), ..unsecured() },
        ComputeOptions { force: true, ..unsecured() },
    ];
    for asked in asked {
        let failed = reader_of("all/7", &w.cache, &gate, asked.clone(), failing).await.unwrap();
        assert!(failed.is_err(), "no grace: {asked:?}");
        let slow = Gate::new();
        let hasty = ComputeOptions { soft_timeout: Some(Duration::from_millis(1)), ..asked };
        let waits = reader_of("all/7", &w.cache, &slow, hasty, move || {
            let value = computed("new", &["patients:id=7"], fence("10:30:", 100));
            Ok(Computed { ttl: Some(SHORT), ..value })
        });
        until("his own computation", || slow.begun() == 1).await;
        slow.go.add_permits(1);
        let outcome = waits.await.unwrap();
        assert_eq!((text(&outcome), stale(&outcome)), ("new".to_owned(), None));
        over(&w, "all/7").await;
    }
    assert_eq!(told(&w.cache.get(&key("all/7"), AtLeast::Lsn(Lsn(50))).await), "miss expired");
    let anyone = reader_of("all/7", &w.cache, &gate, unsecured(), failing).await.unwrap();
    assert_eq!(stale(&anyone), Some(Stale::Revalidate), "whoever asked for nothing is");
}

#[tokio::test]
async fn an_old_value_that_a_hand_invalidated_is_not_answered_at_all() {
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(100);
    old(&w, "all/7").await;
    w.clock.raise(Tag::key(&key("all/7")).hash(), Stamp { lsn: Lsn(100), xid: Xid(20) });
    assert_eq!(told(&w.cache.get(&key("all/7"), AtLeast::Any).await), "miss expired");
    let outcome = reader_of("all/7", &w.cache, &gate, unsecured(), failing).await.unwrap();
    assert!(outcome.is_err());
}

#[tokio::test]
async fn of_those_who_get_an_old_value_by_key_one_has_the_turn_until_a_value_is_put() {
    let w = world();
    old(&w, "swr/7").await;
    let seven = key("swr/7");
    assert_eq!(told(&w.cache.get(&seven, AtLeast::Any).await), "stale old");
    assert!(w.cache.take_turn(&seven) && !w.cache.take_turn(&seven));
    assert_eq!(told(&w.cache.get_many(std::slice::from_ref(&seven), AtLeast::Any).await[0]), "stale old");
    w.put("swr/7", "new", &["patients:id=7"], early());
    assert_eq!(told(&w.cache.get(&seven, AtLeast::Any).await), "hit new");
    over(&w, "swr/7").await;
    assert!(w.cache.take_turn(&seven), "a new value, a new turn");

    w.commit(100, 20, &["patients:id=7"]);
    assert_eq!(told(&w.cache.get(&seven, AtLeast::Any).await), "miss expired", "a commit touched it too");
    assert!(w.cache.take_first_turn(&key("swr/9")) && !w.cache.take_first_turn(&key("swr/9")));
}

#[tokio::test]
async fn without_the_stream_an_old_value_is_marked_by_that() {
    let w = world();
    old(&w, "swr/7").await;
    w.cache.set_hearing(Hearing::Lost { since_ms: 1 });
    let Lookup::Hit { stale, .. } = w.cache.get(&key("swr/7"), AtLeast::Any).await else { panic!("a miss") };
    assert_eq!(stale, Some(Stale::StreamLost));
    let gate = Gate::new();
    gate.go.add_permits(1);
    let outcome = reader_of("swr/7", &w.cache, &gate, options(), fresh("computed", early())).await.unwrap();
    assert_eq!(text(&outcome), "computed", "nothing could be stored, so nobody is sent away with the old one");
}

#[tokio::test]
async fn negative_answers_end_with_their_own_time_and_fall_with_their_tags() {
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(100);
    let nothing = || Ok(Computed::nothing(vec![tag("patients:id=7")], early()));
    let ask = async |name: &str| reader_of(name, &w.cache, &gate, options(), nothing).await.unwrap().unwrap();
    let first = ask("nothing/7").await;
    assert_eq!((first.is_negative(), first.source, first.refusal), (true, Source::Computed, None));
    let again = ask("nothing/7").await;
    assert!(again.is_negative() && matches!(again.source, Source::Tier(_)));
    assert_eq!((gate.begun(), w.cache.stats().negatives.get()), (1, 1));
    w.commit(100, 12, &["patients:id=7"]);
    assert!(matches!(ask("nothing/7").await.source, Source::Tier(_)), "what the snapshot saw does not end it");
    w.commit(110, 20, &["patients:id=7"]);
    assert_eq!(told(&w.cache.get(&key("nothing/7"), AtLeast::Any).await), "miss invalidated");

    let nothing = value("", &[]);
    w.cache.put(&key("nothing/8"), NewValue { negative: true, ttl: Some(HOUR), ..nothing.clone() }, early()).unwrap();
    let Lookup::Hit { entry, .. } = w.cache.get(&key("nothing/8"), AtLeast::Any).await else { panic!("not kept") };
    assert!(entry.negative && entry.expires_at - entry.stored_at <= 1_000, "not longer than the namespace says");
    over(&w, "nothing/8").await;
    let failed = reader_of("nothing/8", &w.cache, &gate, unsecured(), failing).await.unwrap();
    assert!(failed.is_err(), "there is no grace for nothing");
}

#[tokio::test]
async fn where_a_namespace_does_not_keep_that_there_is_nothing_the_answer_says_so() {
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(2);
    for _ in 0..2 {
        let nothing = || Ok(Computed::nothing(vec![], early()));
        let answer = reader_of("plain/7", &w.cache, &gate, options(), nothing).await.unwrap().unwrap();
        assert_eq!((answer.is_negative(), answer.refusal), (true, Some(Refusal::Negative)));
    }
    let put = w.cache.put(&key("plain/7"), NewValue { negative: true, ..value("", &[]) }, early());
    assert_eq!(put.err(), Some(PutError::Negative("plain".into())));
}

#[tokio::test]
async fn what_is_in_use_is_computed_anew_before_it_ends() {
    let w = world();
    let counter = Arc::new(AtomicUsize::new(0));
    let read = || {
        let counter = counter.clone();
        let compute = move || {
            let text = format!("{}", counter.fetch_add(1, Ordering::SeqCst));
            async move { Ok::<_, String>(computed(&text, &["patients:id=7"], early())) }
        };
        let cache = w.cache.clone();
        async move { cache.get_or_compute(&key("ahead/7"), &options(), compute).await }
    };
    let mut told = Vec::new();
    let wait = async {
        while w.cache.stats().refreshes.get() == 0 {
            told.push(stale(&read().await));
            tokio::time::sleep(SOON).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.expect("never computed ahead");
    assert!(told.iter().all(Option::is_none), "all of it fresh");
    until("the landing", || w.cache.flights_aloft() == 0).await;
    assert_ne!(text(&read().await), "0", "the new one");
}

#[tokio::test]
async fn every_entry_carries_the_tags_of_its_namespace() {
    let mut config = CacheConfig { max_tags: 1, ..CacheConfig::default() };
    let tagged = NamespaceConfig { tags: vec![tag("clinic"), tag("own")], ..NamespaceConfig::default() };
    config.namespaces.insert("tagged".into(), tagged);
    let (w, gate) = (world_of(config), Gate::new());
    gate.go.add_permits(1);
    assert_eq!(refusal(&w.put("tagged/1", "one", &["own"], early())), None);
    reader_of("tagged/2", &w.cache, &gate, options(), || Ok(computed("two", &["own"], early()))).await.unwrap().unwrap();
    let Lookup::Hit { entry, .. } = w.cache.get(&key("tagged/1"), AtLeast::Any).await else { panic!("a miss") };
    assert_eq!(&*entry.tags, [tag("own"), tag("clinic")]);
    w.commit(100, 20, &["clinic"]);
    for name in ["tagged/1", "tagged/2"] {
        assert_eq!(told(&w.cache.get(&key(name), AtLeast::Any).await), "miss invalidated");
    }
}

fn entry(name: &str, text: &str, fence: Fence) -> NewEntry {
    NewEntry { key: key(name), value: value(text, &["patients:id=7"]), fence }
}

#[tokio::test]
async fn many_values_are_put_each_with_its_own_outcome_and_some_without_one() {
    let w = world_of(CacheConfig { max_value_bytes: 5, ..CacheConfig::default() });
    w.commit(100, 20, &["patients:id=7"]);
    let outcomes = w.cache.put_many([
        entry("1", "one", fence("10:30:", 100)),
        entry("2", "too large", fence("10:30:", 100)),
        entry("3", "old", early()),
    ]);
    let outcomes = outcomes.await;
    assert!(matches!(&outcomes[..], [Ok(Stored::Yes { .. }), Err(PutError::TooLarge { .. }), Ok(Stored::No(Refusal::Touched))]));
    w.cache.put_soon(entry("4", "four", fence("10:30:", 100)));
    w.cache.put_soon(entry("5", "old", early()));
    w.cache.put_soon(entry("6", "too large", fence("10:30:", 100)));
    assert_eq!(told(&w.cache.get(&key("4"), AtLeast::Any).await), "hit four");
    assert_eq!(w.cache.stats().puts_failed.get(), 2);
}

#[tokio::test]
async fn p7_a_preload_reads_a_few_at_a_time_and_tells_what_became_of_them() {
    let w = world();
    w.commit(100, 20, &["patients:id=7"]);
    let (now, most, turn) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let reads = (0..1_000).map(|n| {
        let (now, most, turn) = (now.clone(), most.clone(), turn.clone());
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            turn.acquire().await.unwrap().forget();
            now.fetch_sub(1, Ordering::SeqCst);
            match n % 10 {
                0 => Err("no such row"),
                1 => Ok(entry(&n.to_string(), "old", early())),
                _ => Ok(entry(&n.to_string(), "new", fence("10:30:", 100))),
            }
        }
    });
    turn.add_permits(1_000);
    assert_eq!(w.cache.preload(reads, 8).await, Preloaded { stored: 800, refused: 100, failed: 100 });
    assert_eq!(w.cache.l1_entries(), 800);
    assert!(most.load(Ordering::SeqCst) <= 8, "{most:?}");
}
