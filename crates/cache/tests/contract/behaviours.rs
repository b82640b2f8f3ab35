//! What every cache must do, one sentence each.

use std::{pin::Pin, time::Duration};

use walcast_cache::{AtLeast, ComputeOptions, Hearing, Lookup, NewValue, PutError, Refusal};
use walcast_model::{Epoch, Fence, Floor, Lsn, Stamp, Tag, Xid};

use super::subject::{Broken, Fault, Outcome, Subject, Tiers};
use crate::common::{computed, fence, key, told, value};

pub type Behaviour = (&'static str, fn(&Subject) -> Pin<Box<dyn Future<Output = Outcome> + '_>>);

macro_rules! behaviours {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), |subject| Box::pin($name(subject)))),*] };
}

pub const BEHAVIOURS: &[Behaviour] = behaviours![
    what_is_put_is_got_whole_and_nothing_else_is,
    many_keys_are_answered_in_their_order,
    a_commit_ends_what_it_touched_and_nothing_else,
    a_commit_that_the_snapshot_saw_ends_nothing,
    a_value_without_a_commit_that_touched_it_is_not_kept,
    an_older_fence_never_takes_the_place_of_a_newer_one,
    a_hand_ends_a_key_a_namespace_or_everything,
    a_moved_floor_ends_everything,
    another_epoch_knows_nothing_of_this_one,
    an_entry_ends_with_its_time,
    how_long_it_may_be_stale_and_that_nothing_is_there_are_kept,
    without_the_stream_nothing_is_fresh,
    a_freshness_that_is_asked_for_is_proven,
    limits_are_kept_at_the_door,
    what_is_computed_is_answered_and_kept,
    of_a_value_from_elsewhere_there_is_the_last_one_or_none,
];

async fn what_is_put_is_got_whole_and_nothing_else_is(s: &Subject) -> Outcome {
    let text = "seven, \"quoted\"\n\\ é \u{0}";
    s.put("whole", text, &["patients:id=7", "a"], fence("10:20:12,15", 0x16_0000_0050)).await;
    s.expect("whole", &format!("hit {text}")).await?;
    s.expect("whole too", "miss absent").await?;
    s.expect("other/whole", "miss absent").await?;
    let Lookup::Hit { entry, .. } = s.look("whole", AtLeast::Any).await else {
        return s.compare("the second look", "miss", "hit");
    };
    let tags: Vec<&str> = entry.tags.iter().map(Tag::as_str).collect();
    let whole = (tags, &*entry.content_type, entry.fence.snapshot.to_string(), entry.fence.settled);
    let expected = (vec!["patients:id=7", "a"], "text/plain", "10:20:12,15".to_owned(), Lsn(0x16_0000_0050));
    if whole == expected { Ok(()) } else { Err(format!("{whole:?} instead of {expected:?}")) }
}

async fn many_keys_are_answered_in_their_order(s: &Subject) -> Outcome {
    for name in ["m1", "m2", "m3"] {
        s.put(name, name, &[name], fence("10:20:", 50)).await;
    }
    s.commit(100, 20, &["m2"]);
    s.disturb();
    if s.tiers == Tiers::Table {
        s.world.cache.clear_local();
    }
    let keys = ["m3", "none", "m2", "m1", "m3"].map(key);
    let answers = s.world.cache.get_many(&keys, AtLeast::Any).await;
    for (lookup, expected) in answers.iter().zip(["hit m3", "miss", "miss", "hit m1", "hit m3"]) {
        s.compare("in its place", &told(lookup), expected)?;
    }
    s.ended("m2", "m2").await
}

async fn a_commit_ends_what_it_touched_and_nothing_else(s: &Subject) -> Outcome {
    for n in ["c7", "c8", "c9"] {
        s.put(n, n, &[&format!("patients:id={n}")], fence("10:20:", 50)).await;
    }
    s.commit(100, 20, &["patients:id=c7"]);
    s.ended("c7", "c7").await?;
    s.expect("c8", "hit c8").await?;
    s.commit(110, 21, &["patients:id=*"]);
    s.ended("c8", "c8").await?;
    s.ended("c9", "c9").await?;
    s.put("c7", "c7 anew", &["patients:id=c7"], fence("30:30:", 110)).await;
    s.expect("c7", "hit c7 anew").await
}

async fn a_commit_that_the_snapshot_saw_ends_nothing(s: &Subject) -> Outcome {
    s.put("seen", "seen", &["t:id=1"], fence("10:20:", 50)).await;
    s.commit(100, 12, &["t:id=1"]);
    s.expect("seen", "hit seen").await
}

async fn a_value_without_a_commit_that_touched_it_is_not_kept(s: &Subject) -> Outcome {
    s.commit(100, 15, &["t:id=2"]);
    let refused = s.put("late", "old", &["t:id=2"], fence("10:20:15", 90)).await;
    if s.broken == Broken::No && refused != Some(Refusal::Touched) {
        return Err(format!("a value of before was stored: {refused:?}"));
    }
    s.ended("late", "old").await?;
    s.put("late", "new", &["t:id=2"], fence("10:21:", 90)).await;
    s.expect("late", "hit new").await
}

async fn an_older_fence_never_takes_the_place_of_a_newer_one(s: &Subject) -> Outcome {
    s.put("back", "newer", &[], fence("10:30:", 100)).await;
    for older in [fence("10:29:", 100), fence("10:99:", 99)] {
        if s.tiers == Tiers::Table {
            s.world.cache.clear_local();
        }
        s.put("back", "older", &[], older).await;
        // Both are true. Where the newer one was lost on its way, the older is as good.
        let answer = s.get("back").await;
        if s.fault == Fault::None || answer != "hit older" {
            s.compare("of back", &answer, "hit newer")?;
        }
    }
    Ok(())
}

async fn a_hand_ends_a_key_a_namespace_or_everything(s: &Subject) -> Outcome {
    let tags = [Tag::key(&key("by/hand")), Tag::namespace("by"), Tag::everything()];
    for (at, tag) in (1..).zip(tags) {
        let text = format!("hand {at}");
        s.put("by/hand", &text, &[], fence("10:20:", 100 * at)).await;
        s.expect("by/hand", &format!("hit {text}")).await?;
        if s.broken != Broken::Deaf {
            s.world.clock.raise(tag.hash(), Stamp::unseen(Lsn(100 * at + 50)));
        }
        s.ended("by/hand", &text).await?;
    }
    Ok(())
}

async fn a_moved_floor_ends_everything(s: &Subject) -> Outcome {
    s.put("floor", "below", &[], fence("10:20:", 50)).await;
    s.world.clock.move_floor(Floor(2));
    s.ended("floor", "below").await?;
    s.put("floor", "above", &[], Fence { floor: Floor(2), ..fence("1:2:", 1) }).await;
    s.expect("floor", "hit above").await
}

async fn another_epoch_knows_nothing_of_this_one(s: &Subject) -> Outcome {
    s.put("epoch", "of seven", &[], fence("10:20:", 50)).await;
    s.world.cache.set_epoch(Epoch(8));
    s.ended("epoch", "of seven").await?;
    s.put("epoch", "of eight", &[], fence("1:2:", 1)).await;
    s.expect("epoch", "hit of eight").await
}

async fn an_entry_ends_with_its_time(s: &Subject) -> Outcome {
    let mut short = value("short", &[]);
    short.ttl = Some(Duration::from_secs(1));
    s.disturb();
    s.world.cache.put(&key("short"), short, fence("10:20:", 50)).unwrap();
    s.flush().await;
    let began = tokio::time::Instant::now();
    let patience = if s.broken == Broken::No { 60 } else { 3 };
    while s.get("short").await.starts_with("hit") {
        if began.elapsed() > Duration::from_secs(patience) {
            return Err("it lives for ever".into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Under a fault that may have been another miss.
    tokio::time::sleep_until(began + Duration::from_secs(1)).await;
    s.ended("short", "short").await
}

async fn how_long_it_may_be_stale_and_that_nothing_is_there_are_kept(s: &Subject) -> Outcome {
    for (name, negative, expected) in [("stale/nothing", true, 0), ("stale/something", false, 600_000)] {
        s.disturb();
        let value = NewValue { negative, ..value("", &[]) };
        s.world.cache.put(&key(name), value, fence("10:20:", 50)).unwrap();
        s.flush().await;
        let Lookup::Hit { entry, .. } = s.look(name, AtLeast::Any).await else {
            s.compare(name, "miss", "hit")?;
            continue;
        };
        let stale_for = entry.stale_until - entry.expires_at;
        if (entry.negative, stale_for) != (negative, expected) {
            return Err(format!("{name}: {} and {stale_for} ms", entry.negative));
        }
    }
    Ok(())
}

async fn without_the_stream_nothing_is_fresh(s: &Subject) -> Outcome {
    s.put("deaf", "kept", &[], fence("10:20:", 50)).await;
    s.world.cache.set_hearing(Hearing::Lost { since_ms: 1 });
    s.expect("deaf", "stale kept").await?;
    s.compare("that must be fresh", &told(&s.look("deaf", AtLeast::Xid(Xid(1))).await), "miss not_hearing")?;
    let refused = s.put("deaf too", "new", &[], fence("10:20:", 50)).await;
    if refused != Some(Refusal::NotHearing) {
        return Err(format!("stored without the stream: {refused:?}"));
    }
    s.expect("deaf too", "miss absent").await?;
    s.world.cache.set_hearing(Hearing::Live);
    s.expect("deaf", "hit kept").await
}

async fn a_freshness_that_is_asked_for_is_proven(s: &Subject) -> Outcome {
    s.put("proof", "p", &["p:id=1"], fence("10:20:", 50)).await;
    s.commit(120, 30, &["q:id=1"]);
    for (at_least, expected) in [
        (AtLeast::Xid(Xid(12)), "hit p"),
        (AtLeast::Xid(Xid(25)), "miss"),
        (AtLeast::Lsn(Lsn(120)), "hit p"),
        (AtLeast::Lsn(Lsn(121)), "miss"),
    ] {
        s.compare(&format!("{at_least:?}"), &told(&s.look("proof", at_least).await), expected)?;
    }
    Ok(())
}

async fn limits_are_kept_at_the_door(s: &Subject) -> Outcome {
    let large = "x".repeat(64 << 10);
    s.put("large", &large, &[], fence("10:20:", 50)).await;
    s.expect("large", &format!("hit {large}")).await?;
    let put = |value| s.world.cache.put(&key("limits"), value, fence("10:20:", 50));
    let too_large = matches!(put(value(&format!("{large}x"), &[])), Err(PutError::TooLarge { .. }));
    let tags: Vec<String> = (0..65).map(|n| format!("t:id={n}")).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    let too_many = matches!(put(value("x", &tags)), Err(PutError::TooManyTags { .. }));
    let mut brief = value("x", &[]);
    brief.ttl = Some(Duration::from_millis(999));
    let too_brief = matches!(put(brief), Err(PutError::Ttl(_)));
    s.flush().await;
    s.expect("limits", "miss absent").await?;
    if too_large && too_many && too_brief { Ok(()) } else { Err(format!("{too_large} {too_many} {too_brief}")) }
}

/// No commit ends such a value, so nothing but the tiers themselves keeps the one before from coming back.
async fn of_a_value_from_elsewhere_there_is_the_last_one_or_none(s: &Subject) -> Outcome {
    let name = "external/session";
    for n in 0..12 {
        // The stream goes on: what was retired may be put again.
        let heard = s.world.cache.external_fence().settled.0;
        s.commit(heard + 100, 1_000 + n, &["somewhere:else"]);
        let text = format!("session {n}");
        match s.put_from_elsewhere(name, &text).await {
            None => s.expect(name, &format!("hit {text}")).await?,
            Some(Refusal::L2Away) if s.fault != Fault::None => s.ended(name, &text).await?,
            Some(refusal) => return Err(format!("{text}: {refusal}")),
        }
        s.over.borrow_mut().push((name.to_owned(), text));
    }
    let last = s.over.borrow_mut().pop().map(|(_, text)| text).unwrap_or_default();
    let heard = s.world.cache.external_fence().settled.0;
    s.commit(heard + 100, 2_000, &["users"]);
    s.ended(name, &last).await
}

async fn what_is_computed_is_answered_and_kept(s: &Subject) -> Outcome {
    let options = ComputeOptions { timeout: Duration::from_secs(60), ..ComputeOptions::default() };
    for (text, lsn) in [("first", 50), ("second", 130)] {
        s.disturb();
        let compute = move || async move { Ok::<_, String>(computed(text, &["k:id=1"], fence(&format!("{lsn}:{lsn}:"), lsn))) };
        // P6: whatever is wrong with a tier, the reader has his answer.
        let answer =
            s.world.cache.get_or_compute(&key("computed"), &options, compute).await.map_err(|error| error.to_string())?;
        if answer.entry.value != text.as_bytes() {
            return Err(format!("{:?} instead of {text}", answer.entry.value));
        }
        s.flush().await;
        s.expect("computed", &format!("hit {text}")).await?;
        s.commit(lsn + 50, lsn + 20, &["k:id=1"]);
        s.ended("computed", text).await?;
    }
    Ok(())
}
