//! What every cache must do, whatever its tiers: in memory, in memory over PostgreSQL, and in PostgreSQL alone as far as
//! a reader can see; then again with something wrong between us and PostgreSQL.
//!
//! Under a fault any answer may be a miss. No answer may be wrong. Two broken tiers show that the suite notices.

mod common;
mod contract {
    pub mod behaviours;
    pub mod subject;
}

use common::l2::postgres;
use contract::{
    behaviours::BEHAVIOURS,
    subject::{Broken, Fault, Subject, Tiers},
};
use walcast_testkit::TestPostgres;

/// What each behaviour did wrong, and how often the table failed us.
async fn run(postgres: Option<&TestPostgres>, tiers: Tiers, fault: Fault, broken: Broken) -> (Vec<String>, u64) {
    let (mut wrong, mut errors) = (Vec::new(), 0);
    for (name, behaviour) in BEHAVIOURS {
        if let Some(postgres) = postgres {
            postgres.execute("truncate walcast.cache_entries").await.unwrap();
        }
        let subject = Subject::new(postgres, tiers, fault, broken).await;
        let outcome = match behaviour(&subject).await {
            Ok(()) => subject.nothing_comes_back().await,
            wrong => wrong,
        };
        wrong.extend(outcome.err().map(|why| format!("{name}: {why}")));
        errors += subject.world.cache.stats().l2_errors.get();
    }
    (wrong, errors)
}

#[tokio::test]
async fn in_memory() {
    assert_eq!(run(None, Tiers::Memory, Fault::None, Broken::No).await, (vec![], 0));
}

#[tokio::test]
async fn in_memory_over_postgresql_and_in_postgresql_alone() {
    let postgres = postgres().await;
    for tiers in [Tiers::MemoryOverTable, Tiers::Table] {
        assert_eq!(run(Some(&postgres), tiers, Fault::None, Broken::No).await, (vec![], 0), "{tiers:?}");
    }
}

/// Nothing wrong, and yet the fault was felt.
async fn holds_under(fault: Fault) {
    let postgres = postgres().await;
    for tiers in [Tiers::MemoryOverTable, Tiers::Table] {
        let (wrong, errors) = run(Some(&postgres), tiers, fault, Broken::No).await;
        assert_eq!(wrong, Vec::<String>::new(), "{tiers:?}, {fault:?}");
        assert!(errors > 10, "{tiers:?}: {fault:?} was felt {errors} times only");
    }
}

#[tokio::test]
async fn p5_p6_over_a_slow_connection() {
    holds_under(Fault::Slow).await;
}

#[tokio::test]
async fn p5_p6_while_the_network_is_silent() {
    holds_under(Fault::Hang).await;
}

#[tokio::test]
async fn p5_p6_while_connections_are_cut() {
    holds_under(Fault::Cut).await;
}

#[tokio::test]
async fn p5_p6_while_answers_are_garbage() {
    holds_under(Fault::Garbage).await;
}

#[tokio::test]
async fn p5_p6_while_nobody_is_let_in() {
    holds_under(Fault::Refuse).await;
}

#[tokio::test]
async fn a_tier_that_answers_rows_without_judging_them_is_noticed() {
    let postgres = postgres().await;
    let (wrong, _) = run(Some(&postgres), Tiers::Table, Fault::None, Broken::NotJudged).await;
    for name in
        ["a_commit_ends_what_it_touched", "a_hand_ends", "a_moved_floor", "another_epoch", "an_entry_ends", "without_the_stream"]
    {
        assert!(wrong.iter().any(|why| why.starts_with(name)), "{name} noticed nothing: {wrong:#?}");
    }
}

#[tokio::test]
async fn a_cache_that_raises_no_tags_is_noticed() {
    let (wrong, _) = run(None, Tiers::Memory, Fault::None, Broken::Deaf).await;
    for name in ["many_keys", "a_commit_ends_what_it_touched", "a_hand_ends", "what_is_computed"] {
        assert!(wrong.iter().any(|why| why.starts_with(name)), "{name} noticed nothing: {wrong:#?}");
    }
}
