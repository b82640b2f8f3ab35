//! A key is looked up: L1, then L2, each entry judged in the hand. And what a look-up answers.
//!
//! Called by readers, and by whoever computes. Never an error: what a tier cannot answer is a miss with its reason.

use std::sync::Arc;

use walcast_model::CacheKey;

use crate::{AtLeast, Cache, Entry, Hearing, L2, MissReason, coarse_clock, stale::is_over};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    L1,
    L2,
}

impl Tier {
    pub fn as_str(self) -> &'static str {
        match self {
            Tier::L1 => "l1",
            Tier::L2 => "l2",
        }
    }
}

/// Why an answer is marked stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stale {
    /// Valid as far as we heard, but we do not hear at present.
    StreamLost,
    /// Old, answered because computing failed.
    Grace,
    /// Old, answered while somebody computes it anew.
    Revalidate,
    /// Old, answered because computing takes longer than the reader would wait.
    SoftTimeout,
    /// Somebody's hand asked for it to be made anew, and the namespace answers it until that is done.
    Softened,
}

impl Stale {
    pub fn as_str(self) -> &'static str {
        match self {
            Stale::StreamLost => "stream_lost",
            Stale::Grace => "grace",
            Stale::Revalidate => "revalidate",
            Stale::SoftTimeout => "soft_timeout",
            Stale::Softened => "softened",
        }
    }
}

#[derive(Debug, Clone)]
pub enum Lookup {
    Hit { entry: Arc<Entry>, tier: Tier, stale: Option<Stale> },
    Miss { reason: MissReason },
}

impl Cache {
    /// What L1 alone has, at once: for whoever cannot wait, or keeps the value elsewhere.
    pub fn get_l1(&self, key: &CacheKey, at_least: AtLeast) -> Lookup {
        self.counted(self.look_l1(key, at_least).unwrap_or_else(|reason| Lookup::Miss { reason }))
    }

    /// L1, then L2. A hit of L2 moves up. Within the namespace's `stale_while_revalidate` an old entry is answered, marked
    /// stale: [`Cache::take_turn`] says to one caller that it is for him to put it anew.
    pub async fn get(&self, key: &CacheKey, at_least: AtLeast) -> Lookup {
        let reason = match self.look_l1(key, at_least) {
            Ok(hit) => return self.counted(hit),
            Err(reason) => reason,
        };
        if let Some(stale) = self.stale_at_once(key, at_least) {
            return self.counted(stale);
        }
        let mut looks = self.look_l2(&[key], at_least).await;
        let look = looks.pop().flatten().unwrap_or(Lookup::Miss { reason });
        self.counted(self.or_stale(key, at_least, look))
    }

    /// In the order of the keys, with one statement for what L1 has not.
    pub async fn get_many(&self, keys: &[CacheKey], at_least: AtLeast) -> Vec<Lookup> {
        let look = |key: &CacheKey| {
            let looked = self.look_l1(key, at_least);
            looked.unwrap_or_else(|reason| self.stale_at_once(key, at_least).unwrap_or(Lookup::Miss { reason }))
        };
        let mut answers: Vec<_> = keys.iter().map(look).collect();
        let open: Vec<usize> = (0..keys.len()).filter(|i| matches!(answers[*i], Lookup::Miss { .. })).collect();
        let open_keys: Vec<&CacheKey> = open.iter().map(|i| &keys[*i]).collect();
        for (i, look) in open.into_iter().zip(self.look_l2(&open_keys, at_least).await) {
            if let Some(look) = look {
                answers[i] = look;
            }
        }
        keys.iter().zip(answers).map(|(key, answer)| self.counted(self.or_stale(key, at_least, answer))).collect()
    }

    /// Judged, not counted. What is over leaves L1, unless the namespace may answer it stale.
    pub(crate) fn look_l1(&self, key: &CacheKey, at_least: AtLeast) -> Result<Lookup, MissReason> {
        // What is there was put under a namespace that the config allows: only a miss, or an entry that is over, asks for it.
        let namespace = || self.namespace(key.namespace()).ok_or(MissReason::UnknownNamespace);
        let Some(entry) = self.0.l1.get(key) else {
            return Err(namespace().map_or_else(|unknown| unknown, |_| MissReason::Absent));
        };
        let reason = match self.judged(&entry, at_least) {
            Ok(stale) => return Ok(Lookup::Hit { entry, tier: Tier::L1, stale }),
            Err(reason) => reason,
        };
        if is_over(reason) && !self.is_worth_keeping(namespace()?, &entry) {
            self.0.l1.remove(key, &entry);
        }
        Err(reason)
    }

    /// Judged, not counted, in the order of the keys. None: L2 has nothing to say.
    async fn look_l2(&self, keys: &[&CacheKey], at_least: AtLeast) -> Vec<Option<Lookup>> {
        let Some(l2) = &self.0.l2 else { return vec![None; keys.len()] };
        let asked: Vec<&CacheKey> = keys.iter().copied().filter(|key| self.l2_of(key).is_some()).collect();
        let mut moves = asked.iter().map(|key| self.0.lines.moves(key)).collect::<Vec<u64>>().into_iter();
        let mut read = l2.read(&asked).await.into_iter();
        let mut look = |key: &CacheKey| {
            self.l2_of(key)?;
            let (moves, entry) = (moves.next()?, read.next()?);
            // Put meanwhile from elsewhere, or about to be: the row may be the one before.
            let is_calm = || self.0.lines.moves(key) == moves;
            let entry = Arc::new(entry?);
            // The clock is asked now, after the row arrived: whatever the row missed meanwhile, or while L2 was
            // away or we were not running, the clock knows by the row's fence.
            let rank = entry.fence.age_rank();
            match self.judged(&entry, at_least) {
                Ok(stale) => {
                    l2.note_hit(key);
                    let stays = |there: &Entry| there.fence.age_rank() >= rank && self.is_valid(there);
                    self.0.l1.put_where(key, entry.clone(), |there| is_calm() && !there.is_some_and(stays));
                    Some(Lookup::Hit { entry, tier: Tier::L2, stale })
                }
                Err(reason) => {
                    if is_over(reason) && self.is_worth_keeping(self.namespace(key.namespace())?, &entry) {
                        let stays = |there: &Entry| there.fence.age_rank() >= rank || self.is_valid(there);
                        self.0.l1.put_where(key, entry, |there| is_calm() && !there.is_some_and(stays));
                    }
                    Some(Lookup::Miss { reason })
                }
            }
        };
        keys.iter().map(|key| look(key)).collect()
    }

    pub(crate) async fn look_l2_one(&self, key: &CacheKey, at_least: AtLeast) -> Option<Lookup> {
        self.look_l2(&[key], at_least).await.pop().flatten()
    }

    pub(crate) fn l2_of(&self, key: &CacheKey) -> Option<&L2> {
        self.namespace(key.namespace()).and(self.0.l2.as_ref())
    }

    /// Why it is to be marked stale, if it may be answered.
    fn judged(&self, entry: &Entry, at_least: AtLeast) -> Result<Option<Stale>, MissReason> {
        self.0.judge.judge(entry, at_least, coarse_clock::now_towards(entry.expires_at))?;
        // Asked last: what was judged before the loss is marked all the same.
        match self.hearing() {
            Hearing::Live => Ok(None),
            // After a crash transaction ids are used again, and we may not have heard of it: nobody can vouch.
            Hearing::Lost { .. } if at_least != AtLeast::Any => Err(MissReason::NotHearing),
            Hearing::Lost { .. } => Ok(Some(Stale::StreamLost)),
        }
    }

    /// Would a reader be answered it, fresh or stale?
    pub(crate) fn is_answered(&self, entry: &Entry) -> bool {
        self.is_valid(entry) || self.is_revalidated(entry)
    }

    pub(crate) fn is_valid(&self, entry: &Entry) -> bool {
        self.0.judge.judge(entry, AtLeast::Any, coarse_clock::now_towards(entry.expires_at)).is_ok()
    }

    pub(crate) fn counted(&self, lookup: Lookup) -> Lookup {
        let stats = &self.0.stats;
        match &lookup {
            Lookup::Hit { tier, stale, entry } => {
                match tier {
                    Tier::L1 => stats.hits_l1.add(1),
                    Tier::L2 => stats.hits_l2.add(1),
                }
                if stale.is_some() {
                    stats.stale.add(1);
                }
                if entry.negative {
                    stats.negatives.add(1);
                }
            }
            Lookup::Miss { reason } => stats.misses(*reason).add(1),
        }
        lookup
    }
}
