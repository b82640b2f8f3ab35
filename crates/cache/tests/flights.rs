//! Who computes, who waits, who may share.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::{
    World, computed, fence, key,
    readers::{Gate, Outcome, fresh, options, reader, text, until},
    world, world_with,
};
use tokio::task::JoinHandle;
use walcast_cache::{AtLeast, CacheConfig, ComputeError, ComputeOptions, Computed, Hearing, Refusal, Source, Stale};
use walcast_model::{Floor, Lsn, Xid};

/// A leader who computes behind the gate, and readers who wait for him.
async fn leader_and_joiners(
    w: &World,
    gate: &Gate,
    joiners: usize,
    answer: impl Fn() -> Result<Computed, String> + Send + Sync + Clone + 'static,
) -> Vec<JoinHandle<Outcome>> {
    let mut readers = vec![reader(&w.cache, gate, options(), answer.clone())];
    until("the leader's computation", || gate.begun() == 1).await;
    for n in 1..=joiners {
        readers.push(reader(&w.cache, gate, options(), answer.clone()));
        until("a joiner's boarding", || w.cache.stats().joins.get() == n as u64).await;
    }
    readers
}

#[tokio::test]
async fn a_hundred_readers_one_computation() {
    let (w, gate) = (world(), Gate::new());
    let answer = || Ok(computed("seven", &["patients:id=7"], fence("10:20:", 50)));
    let readers = leader_and_joiners(&w, &gate, 99, answer).await;
    gate.go.add_permits(1);
    let mut sources = Vec::new();
    for reader in readers {
        let outcome = reader.await.unwrap();
        assert_eq!(text(&outcome), "seven");
        sources.push(outcome.unwrap().source);
    }
    assert_eq!(gate.begun(), 1);
    assert_eq!(sources.iter().filter(|source| **source == Source::Shared).count(), 99);
    let again = reader(&w.cache, &gate, options(), fresh("never asked", fence("10:20:", 50))).await.unwrap();
    assert_eq!(text(&again), "seven", "stored");
    assert_eq!(w.cache.flights_aloft(), 0);
}

#[tokio::test]
async fn p4_a_told_reader_does_not_share_an_older_flight() {
    let (w, gate) = (world(), Gate::new());
    let early = reader(&w.cache, &gate, options(), fresh("before", fence("10:20:", 50)));
    until("the flight", || gate.begun() == 1).await;
    w.commit(100, 20, &["patients:id=7"]);
    let told = reader(&w.cache, &gate, options(), fresh("after", fence("10:21:", 100)));
    until("the join", || w.cache.stats().joins.get() == 1).await;
    gate.go.add_permits(10);
    let early = early.await.unwrap();
    assert_eq!(text(&early), "before", "whoever came before the commit may have it");
    assert_eq!(early.unwrap().refusal, Some(Refusal::Touched), "p5: and it is not stored");
    assert_eq!(text(&told.await.unwrap()), "after");
    let next = reader(&w.cache, &gate, options(), fresh("not computed", fence("10:21:", 100))).await.unwrap();
    assert_eq!(text(&next), "after");
}

#[tokio::test]
async fn p5_what_cannot_be_proven_fresh_is_computed_alone_returned_and_not_stored() {
    let (w, gate) = (world(), Gate::new());
    // Streamed, but not yet visible to any snapshot: no computation can contain it, and nobody was told of it.
    w.commit(100, 20, &["patients:id=7"]);
    gate.go.add_permits(100);
    let outcome = reader(&w.cache, &gate, options(), fresh("old row", fence("10:20:", 50))).await.unwrap();
    assert_eq!(text(&outcome), "old row");
    assert_eq!(outcome.unwrap().refusal, Some(Refusal::Touched));
    assert_eq!(gate.begun(), 3, "two rounds that others could share, one alone");
    assert_eq!(w.cache.l1_entries(), 0);
}

#[tokio::test]
async fn a_cancelled_leader_passes_the_lead_on() {
    let (w, gate) = (world(), Gate::new());
    let answer = || Ok(computed("seven", &["patients:id=7"], fence("10:20:", 50)));
    let mut readers = leader_and_joiners(&w, &gate, 3, answer).await;
    readers.remove(0).abort();
    until("a joiner's own computation", || gate.begun() == 2).await;
    gate.go.add_permits(1);
    for reader in readers {
        assert_eq!(text(&reader.await.unwrap()), "seven");
    }
    assert_eq!(gate.begun(), 2);
    assert_eq!(w.cache.stats().leaders_lost.get(), 3);
}

#[tokio::test]
async fn a_panicking_leader_passes_the_lead_on() {
    let (w, gate) = (world(), Gate::new());
    let leader = reader(&w.cache, &gate, options(), || panic!("a bug in the computation"));
    until("the flight", || gate.begun() == 1).await;
    let joiner = reader(&w.cache, &gate, options(), fresh("seven", fence("10:20:", 50)));
    until("the join", || w.cache.stats().joins.get() == 1).await;
    gate.go.add_permits(2);
    assert!(leader.await.unwrap_err().is_panic());
    assert_eq!(text(&joiner.await.unwrap()), "seven");
}

#[tokio::test]
async fn a_leader_out_of_time_passes_the_lead_on() {
    let (w, gate) = (world(), Gate::new());
    let hasty = ComputeOptions { timeout: Duration::from_millis(300), ..options() };
    let leader = reader(&w.cache, &gate, hasty, fresh("too late", fence("10:20:", 50)));
    until("the flight", || gate.begun() == 1).await;
    let joiner = reader(&w.cache, &gate, options(), fresh("seven", fence("10:20:", 50)));
    assert_eq!(leader.await.unwrap().unwrap_err(), ComputeError::TimedOut { after_ms: 300 });
    until("the joiner's computation", || gate.begun() == 2).await;
    gate.go.add_permits(1);
    assert_eq!(text(&joiner.await.unwrap()), "seven");
}

#[tokio::test]
async fn an_error_reaches_all_who_wait_and_nothing_is_stored() {
    let (w, gate) = (world(), Gate::new());
    let answer = || Err("permission denied".to_owned());
    let readers = leader_and_joiners(&w, &gate, 9, answer).await;
    gate.go.add_permits(1);
    for reader in readers {
        assert_eq!(reader.await.unwrap().unwrap_err(), ComputeError::Failed("permission denied".to_owned()));
    }
    assert_eq!((gate.begun(), w.cache.l1_entries(), w.cache.flights_aloft()), (1, 0, 0));
}

#[tokio::test]
async fn without_the_stream_values_are_computed_and_shared_only_by_those_who_came_before_the_computation() {
    let (w, gate) = (world(), Gate::new());
    w.put("graceful/7", "cached", &["patients:id=7"], fence("10:20:", 50));
    w.cache.set_hearing(Hearing::Lost { since_ms: 1 });
    let counter = Arc::new(AtomicUsize::new(0));
    let answer = move || {
        let n = counter.fetch_add(1, Ordering::SeqCst) + 1;
        Ok(computed(if n == 1 { "first" } else { "second" }, &["patients:id=7"], fence("10:20:", 50)))
    };
    let readers = leader_and_joiners(&w, &gate, 20, answer).await;
    gate.go.add_permits(1);
    until("one of them leading and the others joining him", || gate.begun() == 2 && w.cache.stats().joins.get() == 39).await;
    gate.go.add_permits(1);
    let mut answers = Vec::new();
    for reader in readers {
        let outcome = reader.await.unwrap();
        answers.push(text(&outcome));
    }
    assert_eq!(answers.remove(0), "first");
    assert!(answers.iter().all(|text| text == "second"), "{answers:?}");
    assert_eq!(w.cache.stats().refusals(Refusal::NotHearing).get(), gate.begun() as u64);
    assert_eq!(gate.begun(), 2, "all who waited share the second");
}

#[tokio::test]
async fn p4_at_least_an_xid_waits_until_a_computation_contains_it() {
    let (w, gate) = (world(), Gate::new());
    w.put("graceful/7", "before", &["patients:id=7"], fence("10:20:", 50));
    gate.go.add_permits(100);
    let counter = AtomicUsize::new(0);
    let answer = move || {
        let seen = counter.fetch_add(1, Ordering::SeqCst) >= 3;
        let snapshot = if seen { "10:21:" } else { "10:21:20" };
        Ok(computed(if seen { "after" } else { "before" }, &["patients:id=7"], fence(snapshot, 50)))
    };
    let asked = ComputeOptions { at_least: AtLeast::Xid(Xid(20)), ..options() };
    assert_eq!(text(&reader(&w.cache, &gate, asked.clone(), answer).await.unwrap()), "after");
    let stored = reader(&w.cache, &gate, asked, fresh("not computed", fence("10:20:", 50))).await.unwrap();
    assert_eq!(text(&stored), "after");
}

#[tokio::test]
async fn p4_at_least_a_position_waits_for_the_stream_and_says_so_if_it_does_not_come() {
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(100);
    let asked = |ms| ComputeOptions { at_least: AtLeast::Lsn(Lsn(100)), timeout: Duration::from_millis(ms), ..options() };
    let early = reader(&w.cache, &gate, asked(100), fresh("early", fence("10:20:", 50))).await.unwrap();
    assert_eq!(early.unwrap_err(), ComputeError::Behind);
    assert_eq!(gate.begun(), 0, "nothing computed that could prove nothing");
    let patient = reader(&w.cache, &gate, asked(20_000), fresh("seven", fence("10:21:", 50)));
    w.commit(100, 20, &["patients:id=7"]);
    assert_eq!(text(&patient.await.unwrap()), "seven");
}

#[tokio::test]
async fn grace_answers_what_a_commit_invalidated_where_allowed_and_never_what_a_hand_did() {
    let failing = || Err("the database is away".to_owned());
    let graceful = ComputeOptions { grace: true, ..options() };
    let (w, gate) = (world(), Gate::new());
    gate.go.add_permits(100);
    w.put("graceful/7", "old", &["patients:id=7"], fence("10:20:", 50));
    w.commit(100, 20, &["patients:id=7"]);
    let answer = reader(&w.cache, &gate, graceful.clone(), failing).await.unwrap().unwrap();
    assert_eq!((&answer.entry.value[..], answer.stale), (&b"old"[..], Some(Stale::Grace)));
    let strict = reader(&w.cache, &gate, options(), failing).await.unwrap();
    assert!(strict.is_err(), "row security: no grace");
    let asked = ComputeOptions { at_least: AtLeast::Xid(Xid(1)), ..graceful.clone() };
    assert!(reader(&w.cache, &gate, asked, failing).await.unwrap().is_err(), "a freshness was asked for");
    let stamp = walcast_model::Stamp { lsn: Lsn(110), xid: Xid(21) };
    w.clock.raise(walcast_model::Tag::key(&key("graceful/7")).hash(), stamp);
    assert!(reader(&w.cache, &gate, graceful.clone(), failing).await.unwrap().is_err(), "a hand wanted it gone");

    let w = world();
    w.put("graceful/7", "old", &[], fence("10:20:", 50));
    w.clock.move_floor(Floor(2));
    assert!(reader(&w.cache, &gate, graceful, failing).await.unwrap().is_err(), "from before the floor");
}

#[tokio::test]
async fn p7_past_its_bounds_a_flight_takes_nobody_aboard_and_everyone_still_gets_a_value() {
    let config = CacheConfig { max_flights: 1, max_joiners: 1, ..CacheConfig::default() };
    let (w, gate) = (world_with(config, None), Gate::new());
    let answer = || Ok(computed("seven", &["patients:id=7"], fence("10:20:", 50)));
    let mut readers = leader_and_joiners(&w, &gate, 1, answer).await;
    readers.push(reader(&w.cache, &gate, options(), answer));
    until("a computation alone", || gate.begun() == 2).await;
    let other = || async { Ok::<_, String>(computed("eight", &[], fence("10:20:", 50))) };
    let eight = w.cache.get_or_compute(&key("8"), &options(), other).await;
    assert_eq!(text(&eight), "eight", "another key finds the flights full");
    gate.go.add_permits(2);
    for reader in readers {
        assert_eq!(text(&reader.await.unwrap()), "seven");
    }
    assert_eq!((gate.begun(), w.cache.stats().alone.get()), (2, 2));
}

#[tokio::test]
async fn p6_a_value_that_does_not_fit_is_returned_all_the_same() {
    let w = world_with(CacheConfig { max_value_bytes: 3, max_tags: 1, ..CacheConfig::default() }, None);
    let refusal = async |value: Computed| {
        let compute = move || std::future::ready(Ok::<_, String>(value.clone()));
        w.cache.get_or_compute(&key("7"), &options(), compute).await.unwrap().refusal
    };
    assert_eq!(refusal(computed("four", &[], fence("10:20:", 50))).await, Some(Refusal::TooLarge));
    assert_eq!(refusal(computed("one", &["a", "b"], fence("10:20:", 50))).await, Some(Refusal::TooManyTags));
    let brief = Computed { ttl: Some(Duration::from_millis(500)), ..computed("one", &[], fence("10:20:", 50)) };
    assert_eq!(refusal(brief).await, Some(Refusal::TtlTooShort));
    let long = Computed { ttl: Some(Duration::from_secs(90 * 24 * 3600)), ..computed("one", &[], fence("10:20:", 50)) };
    assert_eq!(refusal(long).await, None);
}

#[tokio::test]
async fn ten_thousand_readers_of_one_cold_key_one_computation() {
    let (w, gate) = (world(), Gate::new());
    let answer = fresh("seven", fence("10:20:", 50));
    let readers: Vec<_> = (0..10_000).map(|_| reader(&w.cache, &gate, options(), answer.clone())).collect();
    until("all but one waiting", || w.cache.stats().joins.get() == 9_999).await;
    gate.go.add_permits(10_000);
    for reader in readers {
        assert_eq!(text(&reader.await.unwrap()), "seven");
    }
    assert_eq!((gate.begun(), w.cache.stats().alone.get()), (1, 0));
}

#[tokio::test]
async fn a_forced_refresh_computes_whatever_is_there_and_stores() {
    let (w, gate) = (world(), Gate::new());
    w.put("graceful/7", "cached", &[], fence("10:20:", 50));
    gate.go.add_permits(100);
    let forced = ComputeOptions { force: true, ..options() };
    let answer = reader(&w.cache, &gate, forced, fresh("new", fence("10:20:", 50))).await.unwrap();
    assert_eq!((text(&answer), answer.unwrap().source), ("new".to_owned(), Source::Computed));
    assert_eq!(text(&reader(&w.cache, &gate, options(), fresh("-", fence("10:20:", 50))).await.unwrap()), "new");
    assert_eq!((gate.begun(), w.cache.stats().forced.get()), (1, 1));
}

#[tokio::test]
async fn a_forced_refresh_shares_only_what_began_after_it_was_asked_for() {
    let (w, gate) = (world(), Gate::new());
    let before = reader(&w.cache, &gate, options(), fresh("begun before", fence("10:20:", 50)));
    until("the flight", || gate.begun() == 1).await;
    let forced = ComputeOptions { force: true, ..options() };
    let readers: Vec<_> =
        (0..50).map(|_| reader(&w.cache, &gate, forced.clone(), fresh("begun after", fence("10:20:", 50)))).collect();
    until("all of them waiting", || w.cache.stats().joins.get() == 50).await;
    gate.go.add_permits(1);
    assert_eq!(text(&before.await.unwrap()), "begun before");
    until("one of them leading", || gate.begun() == 2 && w.cache.stats().joins.get() == 99).await;
    gate.go.add_permits(100);
    for reader in readers {
        assert_eq!(text(&reader.await.unwrap()), "begun after");
    }
    assert_eq!(gate.begun(), 2);
}
