//! Invalidation by hand beyond tags: what a pattern, "all of" and a soft invalidation do to entries, tickets and flights.

mod common;

use std::time::Duration;

use common::{World, fence, key, refusal, told, value, world, world_with};
use walcast_cache::{AtLeast, CacheConfig, NamespaceConfig, Precondition, Refusal, Selection, Stored};
use walcast_model::{Lsn, Stamp, Xid};

async fn get(world: &World, name: &str) -> String {
    told(&world.cache.get(&key(name), AtLeast::Any).await)
}

/// As the pipeline does it: at its place in the stream, before the commit is noted.
fn hear(world: &World, lsn: u64, xid: u64, selection: Selection) {
    world.cache.select(selection, Stamp { lsn: Lsn(lsn), xid: Xid(xid) }, None);
    world.cache.note_invalidated(Lsn(lsn));
}

fn like(pattern: &str) -> Selection {
    Selection::default().with_keys_like(Some(pattern.parse().unwrap()))
}

#[tokio::test]
async fn p5_a_fill_whose_ticket_is_from_before_a_pattern_invalidation_is_refused_and_one_from_after_it_is_stored() {
    let w = world();
    let ticket = w.cache.issue_ticket(&fence("10:20:", 50), &key("user:7"));
    w.put("user:8", "eight", &[], fence("10:20:", 50));
    hear(&w, 100, 20, like("user:*"));
    let before = w.cache.check_ticket(&ticket, &key("user:7")).unwrap();
    assert_eq!(refusal(&w.put("user:7", "old", &[], before.clone())), Some(Refusal::Touched));
    assert_eq!(get(&w, "user:8").await, "miss invalidated");
    assert_eq!(refusal(&w.put("user:7", "new", &[], fence("10:21:", 60))), None, "its snapshot sees the invalidation");
    assert_eq!(get(&w, "user:7").await, "hit new");

    // Control: whoever only deletes what is stored when the invalidation comes lets that fill in.
    let control = world();
    control.put("user:8", "eight", &[], fence("10:20:", 50));
    for name in ["user:7", "user:8"] {
        control.cache.delete_local(&key(name));
    }
    control.cache.note_invalidated(Lsn(100));
    assert!(matches!(control.put("user:7", "old", &[], before), Stored::Yes { .. }));
    assert_eq!(get(&control, "user:7").await, "hit old");
}

#[tokio::test]
async fn a_soft_invalidation_answers_stale_where_the_namespace_says_so_until_the_value_is_made_anew() {
    let mut config = CacheConfig::default();
    let patient = NamespaceConfig { stale_while_revalidate: Duration::from_secs(60), ..NamespaceConfig::default() };
    config.namespaces.insert("swr".into(), patient);
    let w = world_with(config, None);
    for name in ["swr/a", "plain/a", "swr/b"] {
        w.put(name, "old", &[], fence("10:20:", 50));
    }
    hear(&w, 100, 20, like("a").softly(true));
    assert_eq!(get(&w, "swr/a").await, "stale old");
    assert_eq!(get(&w, "swr/b").await, "hit old");
    assert_eq!(get(&w, "plain/a").await, "miss softened");
    assert_eq!(told(&w.cache.get(&key("swr/a"), AtLeast::Lsn(Lsn(100))).await), "miss softened", "asked for by position");
    assert_eq!(refusal(&w.put("swr/a", "from before", &[], fence("10:20:", 60))), Some(Refusal::Touched));
    w.put("swr/a", "new", &[], fence("10:21:", 60));
    assert_eq!(get(&w, "swr/a").await, "hit new");
    hear(&w, 200, 30, like("a").softly(true));
    hear(&w, 210, 31, like("*"));
    assert_eq!(get(&w, "swr/a").await, "miss invalidated", "hard beats soft");
}

#[tokio::test]
async fn a_survey_names_what_would_go_and_takes_nothing() {
    let w = world();
    for n in 0..30 {
        w.put(&format!("k{n}"), "x", &[], fence("10:20:", 50));
    }
    w.put("old", "x", &[], fence("10:20:", 50));
    w.commit(90, 21, &["patients"]);
    hear(&w, 100, 25, like("k1?"));
    let survey = w.cache.survey(&like("k*")).await;
    assert_eq!((survey.entries, survey.estimate), (20, false), "ten are gone already");
    assert_eq!(survey.sample.len(), 20);
    assert_eq!(w.cache.count_local(&like("k*")).entries, 20);
    assert_eq!(w.cache.survey(&like("nobody")).await.entries, 0);
    assert_eq!(get(&w, "k2").await, "hit x");
}

#[tokio::test]
async fn a_value_replaces_only_what_its_writer_says_must_be_there() {
    let w = world();
    let put = async |text: &str, precondition: Precondition| {
        let stored = w.cache.put_if(&key("k"), value(text, &[]), fence("10:20:", 50), &precondition).await.unwrap();
        match stored {
            Stored::Yes { entry } => Ok(entry.etag.clone()),
            Stored::No(refusal) => Err(refusal),
        }
    };
    assert_eq!(put("x", Precondition::Present).await, Err(Refusal::Precondition));
    let first = put("one", Precondition::Absent).await.unwrap();
    assert_eq!(put("two", Precondition::Absent).await, Err(Refusal::Precondition));
    let second = put("two", Precondition::Matches(vec![first.clone()])).await.unwrap();
    assert_eq!(put("three", Precondition::Matches(vec![first])).await, Err(Refusal::Precondition));
    assert_eq!(get(&w, "k").await, "hit two");
    hear(&w, 100, 30, like("k"));
    let late = w.cache.put_if(&key("k"), value("x", &[]), fence("10:40:", 60), &Precondition::Matches(vec![second])).await;
    assert_eq!(refusal(&late.unwrap()), Some(Refusal::Precondition), "what was invalidated is not there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_who_create_the_same_entry_one_does() {
    let w = world();
    for round in 0..50 {
        let name = format!("lock:{round}");
        let tries = (0..8).map(|n| {
            let (cache, key) = (w.cache.clone(), key(&name));
            tokio::spawn(async move {
                let mine = value(&n.to_string(), &[]);
                refusal(&cache.put_if(&key, mine, fence("10:20:", 50), &Precondition::Absent).await.unwrap())
            })
        });
        let mut winners = 0;
        for one in tries.collect::<Vec<_>>() {
            winners += usize::from(one.await.unwrap().is_none());
        }
        assert_eq!(winners, 1);
    }
}
