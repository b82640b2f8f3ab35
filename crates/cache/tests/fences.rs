//! What is stored and what is answered, when commits come in between.

mod common;

use std::time::Duration;

use common::{World, fence, key, refusal, tag, told, value, world, world_with};
use walcast_cache::{AtLeast, CacheConfig, Hearing, NamespaceConfig, Policy, PutError, Refusal, TicketError};
use walcast_model::{Epoch, Floor, Lsn, Stamp, Tag, Xid};

async fn get(world: &World, name: &str) -> String {
    told(&world.cache.get(&key(name), AtLeast::Any).await)
}

async fn get_at_least(world: &World, name: &str, at_least: AtLeast) -> String {
    told(&world.cache.get(&key(name), at_least).await)
}

#[tokio::test]
async fn p5_a_commit_between_the_fence_and_the_put_refuses_the_value() {
    let w = world();
    let ticket = w.cache.issue_ticket(&fence("10:20:", 50), &key("7"));
    w.commit(100, 20, &["patients", "patients:id=7"]);
    let fence = w.cache.check_ticket(&ticket, &key("7")).unwrap();
    assert_eq!(refusal(&w.put("7", "old", &["patients:id=7"], fence)), Some(Refusal::Touched));
    assert_eq!(get(&w, "7").await, "miss absent");
    assert_eq!(w.cache.stats().refusals(Refusal::Touched).get(), 1);
}

#[tokio::test]
async fn p5_a_commit_streamed_before_it_was_visible_refuses_the_value_also_if_the_fence_is_younger() {
    let w = world();
    w.commit(100, 15, &["patients:id=7"]);
    // Taken after the commit was streamed, yet 15 still counts as running: the reader saw the old row.
    assert_eq!(refusal(&w.put("7", "old", &["patients:id=7"], fence("10:20:15", 90))), Some(Refusal::Touched));
    assert_eq!(refusal(&w.put("7", "new", &["patients:id=7"], fence("10:21:", 90))), None);
    assert_eq!(get(&w, "7").await, "hit new");
}

#[tokio::test]
async fn p4_an_entry_is_gone_with_the_commit_that_touched_it_and_others_stay() {
    let w = world();
    w.put("7", "seven", &["patients:id=7"], fence("10:20:", 50));
    w.put("8", "eight", &["patients:id=8"], fence("10:20:", 50));
    w.commit(100, 20, &["patients:id=7"]);
    assert_eq!(get(&w, "7").await, "miss invalidated");
    assert_eq!(get(&w, "7").await, "miss absent");
    assert_eq!(get(&w, "8").await, "hit eight");
    w.commit(110, 21, &["patients:id=*"]);
    assert_eq!(get(&w, "8").await, "miss invalidated", "rows whose id is not known");
}

/// Both rooms that a policy can have: the shared one, and a namespace's own.
#[test]
fn p4_p5_fences_hold_whatever_the_policy_and_whosever_the_room() {
    for policy in Policy::ALL {
        let own = NamespaceConfig { policy, l1_bytes: Some(1 << 20), ..NamespaceConfig::default() };
        let unnamed = NamespaceConfig { policy, ..NamespaceConfig::default() };
        let w = world_with(CacheConfig { namespaces: [("own".into(), own)].into(), unnamed, ..CacheConfig::default() }, None);
        let get = |name: &str| told(&w.cache.get_l1(&key(name), AtLeast::Any));
        for name in ["7", "own/7"] {
            let told = |text: &str| format!("{policy:?} {name}: {text}");
            let lsn = w.cache.invalidated_to().0 + 100;
            let newer = format!("10:{}:", lsn + 20);
            let xid = lsn + 10;
            w.put(name, "old", &["patients:id=7"], fence("10:20:", lsn));
            assert_eq!(get(name), "hit old", "{}", told("stored"));
            assert_eq!(refusal(&w.put(name, "new", &["patients:id=7"], fence(&newer, lsn))), None);
            assert_eq!(refusal(&w.put(name, "old", &["patients:id=7"], fence("10:20:", lsn))), Some(Refusal::Older));
            assert_eq!(get(name), "hit new", "{}", told("an older one does not replace it"));
            w.commit(lsn + 50, xid, &["patients:id=7"]);
            assert_eq!(get(name), "hit new", "{}", told("its snapshot saw the commit"));
            w.commit(lsn + 60, lsn + 30, &["patients:id=7"]);
            assert_eq!(get(name), "miss invalidated", "{}", told("touched"));
            assert_eq!(get(name), "miss absent", "{}", told("and taken out"));
            assert_eq!(refusal(&w.put(name, "new", &["patients:id=7"], fence(&newer, lsn))), Some(Refusal::Touched));
            w.put(name, "kept", &[], fence("10:20:", lsn + 60));
            assert!(w.cache.delete_local(&key(name)) && get(name) == "miss absent", "{}", told("deleted"));
            w.put(name, "kept", &[], fence("10:20:", lsn + 60));
        }
        w.cache.set_epoch(Epoch(9));
        assert_eq!(["7", "own/7"].map(get), ["miss absent", "miss absent"], "{policy:?}: another epoch");
        assert_eq!((w.cache.l1_entries(), w.cache.l1_bytes()), (0, 0), "{policy:?}");
    }
}

#[tokio::test]
async fn p4_a_commit_that_the_snapshot_saw_does_not_evict() {
    let w = world();
    w.put("7", "seven", &["patients:id=7"], fence("10:20:", 50));
    w.commit(100, 12, &["patients:id=7"]);
    assert_eq!(get(&w, "7").await, "hit seven");
}

#[tokio::test]
async fn a_hand_invalidates_a_key_a_namespace_or_everything() {
    let cases = [Tag::key(&key("7")), Tag::namespace("patients"), Tag::everything()];
    for tag in cases {
        let w = world();
        w.put("7", "seven", &[], fence("10:20:", 50));
        w.clock.raise(tag.hash(), Stamp { lsn: Lsn(100), xid: Xid(20) });
        assert_eq!(get(&w, "7").await, "miss invalidated", "{tag}");
    }
}

#[tokio::test]
async fn a_moved_floor_ends_every_entry_and_every_fence_from_before() {
    let w = world();
    w.put("7", "seven", &[], fence("10:20:", 50));
    w.clock.move_floor(Floor(2));
    assert_eq!(get(&w, "7").await, "miss invalidated");
    assert_eq!(refusal(&w.put("7", "seven", &[], fence("10:20:", 50))), Some(Refusal::FloorMoved));
}

#[tokio::test]
async fn an_older_value_does_not_replace_a_newer_one_unless_that_is_over() {
    let w = world();
    w.put("7", "new", &["patients:id=7"], fence("10:30:", 60));
    assert_eq!(refusal(&w.put("7", "old", &["patients:id=7"], fence("10:20:", 50))), Some(Refusal::Older));
    assert_eq!(get(&w, "7").await, "hit new");
    assert_eq!(refusal(&w.put("7", "same age", &["patients:id=7"], fence("10:30:", 60))), None);
    w.commit(100, 40, &["patients:id=7"]);
    assert_eq!(refusal(&w.put("7", "other tags", &["doctors"], fence("10:20:", 50))), None);
    assert_eq!(get(&w, "7").await, "hit other tags");
}

#[tokio::test]
async fn p4_at_least_an_xid_is_answered_only_from_a_snapshot_that_saw_it() {
    let w = world();
    w.put("7", "seven", &[], fence("10:20:15", 50));
    for (xid, answer) in [(9, "hit seven"), (14, "hit seven"), (15, "miss behind"), (20, "miss behind")] {
        assert_eq!(get_at_least(&w, "7", AtLeast::Xid(Xid(xid))).await, answer, "{xid}");
    }
    assert_eq!(get(&w, "7").await, "hit seven", "behind is not over");
}

#[tokio::test]
async fn p4_at_least_a_position_is_answered_once_the_stream_came_that_far() {
    let w = world();
    w.put("7", "seven", &["patients:id=7"], fence("10:20:", 50));
    assert_eq!(get_at_least(&w, "7", AtLeast::Lsn(Lsn(50))).await, "hit seven");
    assert_eq!(get_at_least(&w, "7", AtLeast::Lsn(Lsn(51))).await, "miss behind");
    w.commit(100, 30, &["doctors"]);
    assert_eq!(get_at_least(&w, "7", AtLeast::Lsn(Lsn(100))).await, "hit seven");
    assert_eq!(get_at_least(&w, "7", AtLeast::Lsn(Lsn(101))).await, "miss behind");
}

#[tokio::test]
async fn without_the_stream_nothing_is_fresh_nothing_is_stored_and_no_freshness_is_vouched_for() {
    let w = world();
    w.put("7", "seven", &[], fence("10:20:", 50));
    w.cache.set_hearing(Hearing::Lost { since_ms: 1 });
    assert_eq!(get(&w, "7").await, "stale seven");
    assert_eq!(get_at_least(&w, "7", AtLeast::Xid(Xid(9))).await, "miss not_hearing");
    assert_eq!(refusal(&w.put("8", "eight", &[], fence("10:20:", 50))), Some(Refusal::NotHearing));
    w.cache.set_hearing(Hearing::Live);
    assert_eq!(get(&w, "7").await, "hit seven");
}

#[tokio::test]
async fn a_new_cache_trusts_nothing_until_it_is_told_that_commits_are_heard() {
    let clock = std::sync::Arc::new(walcast_model::TagClock::new(16, Floor(1)));
    let cache = walcast_cache::Cache::new(CacheConfig::default(), clock, None);
    assert!(matches!(cache.hearing(), Hearing::Lost { .. }));
    let stored = cache.put(&key("7"), value("seven", &[]), fence("10:20:", 50)).unwrap();
    assert_eq!(refusal(&stored), Some(Refusal::NotHearing));
}

#[tokio::test]
async fn a_value_is_checked_at_the_door() {
    let w = world_with(CacheConfig { max_value_bytes: 10, max_tags: 2, strict: true, ..CacheConfig::default() }, None);
    let put = |name: &str, value| w.cache.put(&key(name), value, fence("10:20:", 50)).map(|stored| refusal(&stored));
    assert_eq!(put("graceful/7", value("1234567890", &["a", "b"])), Ok(None));
    assert_eq!(put("graceful/7", value("12345678901", &[])), Err(PutError::TooLarge { bytes: 11, limit: 10 }));
    assert_eq!(put("graceful/7", value("1", &["a", "b", "c"])), Err(PutError::TooManyTags { count: 3, limit: 2 }));
    assert_eq!(put("unnamed/7", value("1", &[])), Err(PutError::UnknownNamespace("unnamed".into())));
    assert_eq!(get(&w, "unnamed/7").await, "miss unknown_namespace");
    for ttl in [Duration::ZERO, Duration::from_millis(999), Duration::from_secs(30 * 24 * 3600 + 1)] {
        let mut new = value("1", &[]);
        new.ttl = Some(ttl);
        assert_eq!(put("graceful/7", new), Err(PutError::Ttl(ttl)));
    }
    let mut new = value("1", &[]);
    new.content_type = "a\nb".into();
    assert_eq!(put("graceful/7", new), Err(PutError::ContentType));
}

#[tokio::test]
async fn an_external_value_lives_until_a_hand_ends_it() {
    let w = world();
    w.commit(100, 30, &["patients"]);
    let fence = w.cache.external_fence();
    assert_eq!(refusal(&w.put("external/session", "ann", &["user:ann"], fence)), None);
    w.commit(110, 31, &["patients"]);
    assert_eq!(get(&w, "external/session").await, "hit ann");
    w.commit(120, 32, &["user:ann"]);
    assert_eq!(get(&w, "external/session").await, "miss invalidated");
}

#[tokio::test]
async fn a_ticket_holds_for_its_key_and_its_epoch() {
    let w = world();
    w.cache.set_epoch(Epoch(5));
    let ticket = w.cache.issue_ticket(&fence("10:20:", 50), &key("7"));
    assert_eq!(w.cache.check_ticket(&ticket, &key("7")), Ok(fence("10:20:", 50)));
    assert_eq!(w.cache.check_ticket(&ticket, &key("8")), Err(TicketError::OtherKey));
    w.cache.set_epoch(Epoch(6));
    assert_eq!(w.cache.check_ticket(&ticket, &key("7")), Err(TicketError::OtherEpoch));
}

#[tokio::test]
async fn many_keys_are_answered_in_their_order_and_counted() {
    let w = world();
    w.put("1", "one", &[], fence("10:20:", 50));
    w.put("3", "three", &["gone"], fence("10:20:", 50));
    w.clock.raise(tag("gone").hash(), Stamp::unseen(Lsn(100)));
    let answers = w.cache.get_many(&[key("3"), key("2"), key("1")], AtLeast::Any).await;
    let answers: Vec<_> = answers.iter().map(told).collect();
    assert_eq!(answers, ["miss invalidated", "miss absent", "hit one"]);
    assert!(w.cache.delete_local(&key("1")));
    assert_eq!(get(&w, "1").await, "miss absent");
    let counted = w.cache.stats().all();
    for expected in [("hits_l1", None, 1), ("misses", Some("absent"), 2), ("misses", Some("invalidated"), 1), ("stores", None, 2)]
    {
        assert!(counted.contains(&expected), "{expected:?} in {counted:?}");
    }
}
