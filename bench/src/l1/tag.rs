//! How long it takes to invalidate a tag that a million entries carry: until the call is back, from when on no reader is
//! answered by any of them.

use std::{sync::Arc, time::Instant};

use anyhow::bail;
use walcast_cache::{AtLeast, Cache, CacheConfig, Hearing, Lookup, NewValue, Stored};
use walcast_model::{CacheKey, Floor, Lsn, Stamp, Tag, TagClock, Xid};

use crate::figures::{self, Figures};

const ENTRIES: u64 = 1_000_000;
const RAISES: u64 = 1_000;

pub fn run(rounds: u32) -> anyhow::Result<()> {
    let clock = Arc::new(TagClock::new(TagClock::DEFAULT_SLOTS, Floor(1)));
    let cache = Cache::new(CacheConfig { l1_bytes: 4 << 30, ..CacheConfig::default() }, clock, None);
    cache.set_hearing(Hearing::Live);
    let tag = Tag::parse("patients")?;
    let keys: Vec<CacheKey> = (0..ENTRIES).map(|n| CacheKey::new("bench", &format!("patient:{n}"))).collect::<Result<_, _>>()?;
    let (mut first, mut mean) = (Figures::default(), Figures::default());
    let mut lsn = 1_000;
    for _ in 0..rounds {
        fill(&cache, &keys, &tag)?;
        let hit = |key: &CacheKey| matches!(cache.get_l1(key, AtLeast::Any), Lookup::Hit { .. });
        if !keys.iter().all(hit) {
            bail!("not all of {ENTRIES} entries were there before the tag was raised");
        }
        let mut raise = || {
            lsn += 100;
            let began = Instant::now();
            cache.clock().raise(tag.hash(), Stamp { lsn: Lsn(lsn), xid: Xid(lsn) });
            cache.note_invalidated(Lsn(lsn));
            began.elapsed()
        };
        first.add(raise().as_secs_f64() * 1e6);
        if keys.iter().any(hit) {
            bail!("an entry was answered after its tag was raised");
        }
        let began = Instant::now();
        for _ in 0..RAISES {
            raise();
        }
        mean.add(began.elapsed().as_secs_f64() * 1e6 / RAISES as f64);
    }
    let row = vec![format!("{ENTRIES} entries"), first.show(3), mean.show(3)];
    let head = ["", "the raise, µs", "mean of 1,000 more, µs"];
    figures::table("A tag that all entries carry is invalidated; none was answered afterwards", &head, &[row]);
    Ok(())
}

fn fill(cache: &Cache, keys: &[CacheKey], tag: &Tag) -> anyhow::Result<()> {
    for key in keys {
        let tags = vec![tag.clone()];
        let value = NewValue { value: super::value(), content_type: "text/plain".into(), tags, ttl: None, negative: false };
        if let Stored::No(refusal) = cache.put(key, value, cache.external_fence())? {
            bail!("{key} was not stored: {refusal}");
        }
    }
    Ok(())
}
