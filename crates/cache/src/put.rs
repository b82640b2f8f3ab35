//! A value is put: is it fit to be kept, may it be stored, and is what is there older?
//!
//! Called by whoever read or wrote the value; those from elsewhere go through `external`. Storing is never what makes the
//! cache safe: each read judges what it has in hand.

use std::{sync::Arc, time::Duration};

use walcast_model::{CacheKey, Fence};

use crate::{
    AtLeast, Cache, CacheConfig, Entry, Lookup, NamespaceConfig, NewValue, Precondition, PutError, Refusal,
    entry::{Life, now_ms},
};

#[derive(Debug, Clone)]
pub enum Stored {
    Yes { entry: Arc<Entry> },
    No(Refusal),
}

impl Cache {
    /// The value was read at `fence`: from its ticket, or, without a second tier, from [`Cache::external_fence`].
    pub fn put(&self, key: &CacheKey, value: NewValue, fence: Fence) -> Result<Stored, PutError> {
        if self.waits(key) {
            return Err(PutError::MustWait(key.namespace().to_owned()));
        }
        Ok(self.store(key, self.made(key, value, fence)?))
    }

    /// Replaces only what the caller says must be there. One node is one judge of that: see [`Precondition`].
    pub async fn put_if(
        &self,
        key: &CacheKey,
        value: NewValue,
        fence: Fence,
        precondition: &Precondition,
    ) -> Result<Stored, PutError> {
        if self.is_external(key) {
            return self.put_external(self.arrive_with(key, fence), key, value, precondition).await;
        }
        let entry = self.made(key, value, fence)?;
        // What only L2 has is there too. It moves up, and is held here in case L1 has no room for it.
        let in_l2 = match precondition {
            Precondition::None => None,
            _ if self.look_l1(key, AtLeast::Any).is_ok() => None,
            _ => match self.look_l2_one(key, AtLeast::Any).await {
                Some(Lookup::Hit { entry, .. }) => Some(entry),
                _ => None,
            },
        };
        Ok(self.store_if(key, entry, |there| precondition.is_met(there.or(in_l2.as_deref()))))
    }

    /// Whatever of a put can be wrong in itself.
    pub fn check(&self, key: &CacheKey, value: &NewValue) -> Result<(), PutError> {
        self.fit(key, value).map(drop)
    }

    pub(crate) fn made(&self, key: &CacheKey, value: NewValue, fence: Fence) -> Result<Arc<Entry>, PutError> {
        let (namespace, ttl) = self.fit(key, &value)?;
        // Stored or refused, his turn is over.
        self.give_turn_back(key);
        Ok(self.entry(key, namespace, value, ttl, fence))
    }

    fn fit(&self, key: &CacheKey, value: &NewValue) -> Result<(&NamespaceConfig, Duration), PutError> {
        let unknown = || PutError::UnknownNamespace(key.namespace().to_owned());
        let namespace = self.namespace(key.namespace()).ok_or_else(unknown)?;
        let config = &self.0.config;
        if value.value.len() > config.max_value_bytes {
            return Err(PutError::TooLarge { bytes: value.value.len(), limit: config.max_value_bytes });
        }
        if value.tags.len() > config.max_tags {
            return Err(PutError::TooManyTags { count: value.tags.len(), limit: config.max_tags });
        }
        if !content_type_is_valid(&value.content_type) {
            return Err(PutError::ContentType);
        }
        let ttl = config.ttl(namespace, value.ttl, value.negative);
        let ttl = ttl.ok_or_else(|| PutError::Negative(key.namespace().to_owned()))?;
        if !(CacheConfig::MIN_TTL..=CacheConfig::MAX_TTL).contains(&ttl) {
            return Err(PutError::Ttl(ttl));
        }
        Ok((namespace, ttl))
    }

    /// What every entry of the namespace has is added here.
    pub(crate) fn entry(
        &self,
        key: &CacheKey,
        namespace: &NamespaceConfig,
        mut value: NewValue,
        ttl: Duration,
        fence: Fence,
    ) -> Arc<Entry> {
        for tag in &namespace.tags {
            if !value.tags.contains(tag) {
                value.tags.push(tag.clone());
            }
        }
        let mut life = Life::within(ttl, namespace);
        // "There is nothing" is never answered stale: it is cheap to find out again.
        if value.negative {
            life.stale = Duration::ZERO;
        }
        Arc::new(Entry::new(key, value, life, fence, now_ms()))
    }

    pub(crate) fn store(&self, key: &CacheKey, entry: Arc<Entry>) -> Stored {
        self.store_if(key, entry, |_| true)
    }

    pub(crate) fn store_if(&self, key: &CacheKey, entry: Arc<Entry>, is_met: impl FnOnce(Option<&Entry>) -> bool) -> Stored {
        if let Some(refusal) = self.0.judge.refuses(&entry) {
            return self.refused(refusal);
        }
        let rank = entry.fence.age_rank();
        let mut refusal = None;
        let suits = |there: Option<&Entry>| {
            if !is_met(there.filter(|there| self.is_answered(there))) {
                refusal = Some(Refusal::Precondition);
            } else if there.is_some_and(|there| there.fence.age_rank() > rank && self.is_valid(there)) {
                refusal = Some(Refusal::Older);
            } else if let Some(l2) = self.0.l2.as_ref().filter(|_| !self.is_external(key)) {
                // While nobody else may put this key: of two with equal fences the table would keep the one queued last.
                // A value from elsewhere is there already.
                l2.write(key, &entry);
            }
            refusal.is_none()
        };
        if !self.0.l1.put_where(key, entry.clone(), suits) {
            return self.refused(refusal.unwrap_or(Refusal::Older));
        }
        // A commit that comes in between the test above and here finds the entry stored and invalid: harmless,
        // because each read judges what it has in hand.
        self.give_turn_back(key);
        self.0.stats.stores.add(1);
        Stored::Yes { entry }
    }

    pub(crate) fn refused(&self, refusal: Refusal) -> Stored {
        self.0.stats.refusals(refusal).add(1);
        Stored::No(refusal)
    }

    /// A put of it waits for L2.
    pub(crate) fn waits(&self, key: &CacheKey) -> bool {
        self.0.l2.is_some() && self.is_external(key)
    }
}

pub(crate) fn content_type_is_valid(text: &str) -> bool {
    (1..=255).contains(&text.len()) && text.bytes().all(|b| (0x20..0x7f).contains(&b))
}
