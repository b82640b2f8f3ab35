//! Many keys at once: what [`Engine::cache_get`] and [`Engine::cache_ticket`] do for one.
//!
//! One statement for what memory has not, one fence for all tickets.

use walcast_cache::{Lookup, MissReason};
use walcast_model::CacheKey;

use crate::{Engine, freshness::Freshness};

impl Engine {
    /// In the order of the keys.
    pub async fn cache_get_many(&self, keys: &[CacheKey], freshness: Freshness) -> Vec<Lookup> {
        match self.core.at_least(freshness).await {
            Some(at_least) => {
                let looks = self.core.cache.get_many(keys, at_least).await;
                looks.into_iter().map(|look| self.core.as_configured(look)).collect()
            }
            None => vec![Lookup::Miss { reason: MissReason::NotHearing }; keys.len()],
        }
    }

    /// In the order of the keys, of one fence. None while the database is away: nothing could be admitted.
    pub async fn cache_tickets(&self, keys: &[&CacheKey]) -> Vec<Option<String>> {
        if keys.is_empty() {
            return Vec::new();
        }
        let fence = self.core.fence_in_time().await;
        keys.iter().map(|key| fence.as_ref().map(|fence| self.core.cache.issue_ticket(fence, key))).collect()
    }
}
