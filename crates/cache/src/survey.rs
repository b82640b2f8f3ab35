//! Who would go: counts and names the entries that a selection takes. Information only; what makes an invalidation
//! hold is the judge, and nothing here changes anything.
//!
//! Called before an invalidation by hand and for its dry run. Bounded in entries, rows and time: what was cut short is
//! an estimate and says so.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use tokio::time::timeout;
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};
use walcast_model::{CacheKey, Fence, Floor, Lsn, Tag};
use walcast_pg::PgError;

use crate::{Cache, Entry, NewValue, Selection, entry::now_ms, l2::Table, selections::Touch};

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Survey {
    pub entries: u64,
    /// Not everything was looked at.
    pub estimate: bool,
    /// Some of them.
    pub sample: Vec<CacheKey>,
}

/// Entries of L1 that a count without names looks at: from there on it takes the rest to be like them.
const COUNTED: u64 = 10_000;
const L1_TIME: Duration = Duration::from_millis(200);
const L2_TIME: Duration = Duration::from_secs(2);
const L2_ROWS: usize = 20_000;
const SAMPLE: usize = 20;

impl Cache {
    /// How many entries of L1 it takes, about.
    pub fn count_local(&self, selection: &Selection) -> Survey {
        self.count_within(selection, L1_TIME)
    }

    fn count_within(&self, selection: &Selection, time: Duration) -> Survey {
        let (mut looked, mut taken, now, began) = (0_u64, 0_u64, now_ms(), Instant::now());
        let is_whole = self.0.l1.each(|_, entry| {
            looked += 1;
            taken += u64::from(self.takes(selection, entry, now));
            looked < COUNTED && began.elapsed() < time
        });
        let entries = if is_whole { taken } else { taken * (self.l1_entries() as u64).max(looked) / looked.max(1) };
        Survey { entries, estimate: !is_whole || self.0.l2.is_some(), sample: Vec::new() }
    }

    /// How many of these keys L1 has.
    pub fn count_keys(&self, keys: &[CacheKey], selection: &Selection) -> Survey {
        let now = now_ms();
        let is_taken = |key: &&CacheKey| self.0.l1.get(key).is_some_and(|entry| self.takes(selection, &entry, now));
        let entries = keys.iter().filter(is_taken).count() as u64;
        Survey { entries, estimate: self.0.l2.is_some(), sample: Vec::new() }
    }

    /// Which entries it takes, of both tiers.
    pub async fn survey(&self, selection: &Selection) -> Survey {
        let (cache, asked) = (self.clone(), selection.clone());
        let scan = move || cache.scan_l1(&asked);
        let Ok((mut survey, seen)) = tokio::task::spawn_blocking(scan).await else {
            return Survey { estimate: true, ..Survey::default() };
        };
        let Some(l2) = &self.0.l2 else { return survey };
        match l2.table().survey(selection).await {
            Ok((rows, is_whole)) => {
                survey.estimate |= !is_whole;
                let now = now_ms();
                for row in rows.iter().filter(|row| !seen.contains(&row.key) && self.takes(selection, row, now)) {
                    survey.add(&row.key);
                }
            }
            Err(error) => {
                tracing::debug!(%error, "the rows of the cache table are not counted");
                survey.estimate = true;
            }
        }
        survey
    }

    fn scan_l1(&self, selection: &Selection) -> (Survey, HashSet<CacheKey>) {
        let (mut survey, mut seen, now, began) = (Survey::default(), HashSet::new(), now_ms(), Instant::now());
        let is_whole = self.0.l1.each(|key, entry| {
            if self.takes(selection, entry, now) {
                survey.add(key);
                seen.insert(key.clone());
            }
            began.elapsed() < L1_TIME
        });
        survey.estimate = !is_whole;
        (survey, seen)
    }

    /// Is there anything of it left to take?
    fn takes(&self, selection: &Selection, entry: &Entry, now: u64) -> bool {
        let is_left = || match self.0.judge.touch(entry) {
            Touch::Not => true,
            Touch::Soft { .. } => !selection.is_soft(),
            Touch::Hard => false,
        };
        now < entry.stale_until && selection.selects(entry) && is_left()
    }
}

impl Survey {
    fn add(&mut self, key: &CacheKey) {
        self.entries += 1;
        if self.sample.len() < SAMPLE {
            self.sample.push(key.clone());
        }
    }
}

const DOING: &str = "counting rows of the cache table";

/// Rather too many: each row is tested once more by the selection itself.
const ROWS: &str = "
select namespace, key, tags, floor, settled::text, snapshot, (extract(epoch from stale_until) * 1000)::int8
from walcast.cache_entries
where epoch = $1 and stale_until > now() and ($2::text is null or namespace = $2) and ($3::text is null or split_part(key, chr(31), 1) like $3)
  and tags @> $4 and ($5::text[] is null or tags && $5) and ($6::text[] is null or split_part(key, chr(31), 1) = any ($6))
limit $7";

impl Table {
    /// And whether these are all.
    async fn survey(&self, selection: &Selection) -> Result<(Vec<Entry>, bool), PgError> {
        let away = |why: &str| PgError::Away { doing: DOING, source: why.to_owned().into() };
        if self.breaker.is_open() {
            return Err(away("it failed several times and is left alone for a while"));
        }
        let epoch = self.epoch().to_string();
        let like = selection.pattern().map(|pattern| pattern.like());
        let is_written = |tag: &&Tag| !tag.as_str().starts_with('~');
        let all_of: Vec<&str> = selection.all_of().iter().filter(is_written).map(Tag::as_str).collect();
        let is_of_rows = |tag: &Tag| is_written(&tag) && tag.row_parts().is_none_or(|(_, _, value)| value != "*");
        let plain = !selection.any_of().is_empty() && selection.any_of().iter().all(is_of_rows);
        let any_of: Option<Vec<&str>> = plain.then(|| selection.any_of().iter().map(Tag::as_str).collect());
        let keys: Option<Vec<&str>> = selection.any_of().iter().map(key_of).collect();
        let keys = keys.filter(|keys| !keys.is_empty());
        let most = L2_ROWS as i64;
        let parameters: [(&(dyn ToSql + Sync), Type); 7] = [
            (&epoch, Type::TEXT),
            (&selection.namespace(), Type::TEXT),
            (&like, Type::TEXT),
            (&all_of, Type::TEXT_ARRAY),
            (&any_of, Type::TEXT_ARRAY),
            (&keys, Type::TEXT_ARRAY),
            (&most, Type::INT8),
        ];
        let lease = self.pool.lease(DOING).await?;
        let begin = format!("begin read only; set local statement_timeout = {}", L2_TIME.as_millis());
        let statements = async {
            lease.batch_execute(&begin).await?;
            let rows = lease.query_typed(ROWS, &parameters).await?;
            lease.batch_execute("commit").await?;
            Ok(rows)
        };
        match timeout(L2_TIME * 2, statements).await {
            Ok(Ok(rows)) => Ok((rows.iter().filter_map(without_value).collect(), rows.len() < L2_ROWS)),
            Ok(Err(error)) => {
                lease.discard();
                Err(PgError::from_driver(DOING, error))
            }
            Err(_) => {
                lease.discard();
                Err(away("no answer in time"))
            }
        }
    }
}

/// What a key's own tag says was asked for.
fn key_of(tag: &Tag) -> Option<&str> {
    Some(tag.as_str().strip_prefix("~key:")?.split_once(':')?.1)
}

/// All that judging needs. None if the row is not as we write them.
fn without_value(row: &Row) -> Option<Entry> {
    let key = CacheKey::stored(row.try_get(0).ok()?, row.try_get(1).ok()?).ok()?;
    let tags: Vec<&str> = row.try_get(2).ok()?;
    let settled: Lsn = row.try_get::<_, &str>(4).ok()?.parse().ok()?;
    let floor = Floor(u64::try_from(row.try_get::<_, i64>(3).ok()?).ok()?);
    let fence = Fence { snapshot: row.try_get::<_, &str>(5).ok()?.parse().ok()?, settled, floor };
    let stale_until = u64::try_from(row.try_get::<_, i64>(6).ok()?).ok()?;
    let tags = tags.into_iter().map(Tag::stored).collect();
    let nothing = NewValue { value: Default::default(), content_type: "".into(), tags, ttl: None, negative: false };
    Some(Entry::stored(&key, nothing, fence, [0, stale_until, stale_until], "".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CacheConfig;

    #[tokio::test]
    async fn p7_a_count_whose_time_is_over_ends_there_and_says_that_it_is_an_estimate() {
        let (cache, _hand) = Cache::standalone(CacheConfig::default());
        for n in 0..100 {
            let value =
                NewValue { value: "x".into(), content_type: "text/plain".into(), tags: vec![], ttl: None, negative: false };
            cache.put(&CacheKey::new("n", &format!("k{n}")).unwrap(), value, cache.external_fence()).unwrap();
        }
        let all = Selection::default().with_keys_like(Some("k*".parse().unwrap()));
        let whole = Survey { entries: 100, estimate: false, sample: Vec::new() };
        assert_eq!(cache.count_local(&all), whole);
        assert_eq!(cache.count_within(&all, Duration::ZERO), Survey { estimate: true, ..whole });
    }
}
