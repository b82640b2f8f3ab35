//! Who is subscribed to what, right now. A subscription lives exactly as long as its handle: dropping it removes everything.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use parking_lot::RwLock;
use walcast_hub::{Gate, Outbox, Place};
use walcast_matcher::{Binding, Index, SubscriptionId};
use walcast_model::{Change, Claims, Table};
use walcast_protocol::phoenix::Vsn;

/// How a subscriber's frames look.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Shape {
    Sse,
    Realtime {
        vsn: Vsn,
        topic: Arc<str>,
        /// Only clients that asked get `position` on events.
        positions: bool,
    },
}

#[derive(Debug)]
pub struct Subscriber {
    claims: RwLock<Claims>,
    pub gate: Gate,
    pub shape: Shape,
    bindings: Vec<(SubscriptionId, Wanted)>,
}

/// One binding and the id under which the client knows it.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub binding: Binding,
    pub client_id: u32,
}

impl Subscriber {
    pub fn claims(&self) -> Claims {
        self.claims.read().clone()
    }

    pub fn set_claims(&self, claims: Claims) {
        *self.claims.write() = claims;
    }

    pub fn is_expired(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.claims.read().expires_at() <= now
    }

    /// Columns that the bindings filter on: a role that may not read them any more hears nothing.
    pub fn filter_columns(&self, client_ids: &[u32]) -> impl Iterator<Item = &str> {
        let asked = self.bindings.iter().filter(|(_, wanted)| client_ids.contains(&wanted.client_id));
        asked.flat_map(|(_, wanted)| wanted.binding.filters.iter().map(|filter| filter.column.as_str()))
    }

    /// An index of this subscriber alone, for its replay.
    pub fn own_index(&self) -> Index {
        let mut index = Index::default();
        self.bindings.iter().for_each(|(id, wanted)| index.subscribe(*id, wanted.binding.clone()));
        index
    }

    pub fn client_ids(&self, found: &[SubscriptionId]) -> Vec<u32> {
        let mut ids: Vec<u32> =
            self.bindings.iter().filter(|(id, _)| found.contains(id)).map(|(_, wanted)| wanted.client_id).collect();
        ids.dedup();
        ids
    }

    pub fn offer(&self, place: Place, frame: Bytes) -> bool {
        self.gate.offer(place, frame)
    }
}

#[derive(Default)]
pub struct Subscriptions {
    inner: RwLock<Inner>,
    next: AtomicU64,
}

#[derive(Default)]
struct Inner {
    index: Index,
    by_id: HashMap<SubscriptionId, (Arc<Subscriber>, u32)>,
}

/// Owns a subscription. Dropping it unsubscribes.
pub struct SubscriptionHandle {
    pub subscriber: Arc<Subscriber>,
    registry: Arc<Subscriptions>,
}

impl Subscriptions {
    /// Registered first, answered later: from here on its gate holds whatever matches.
    pub fn register(
        self: &Arc<Self>,
        claims: Claims,
        shape: Shape,
        wanted: Vec<Wanted>,
        outbox: Outbox,
        limit_bytes: usize,
    ) -> SubscriptionHandle {
        let bindings: Vec<_> =
            wanted.into_iter().map(|wanted| (SubscriptionId(self.next.fetch_add(1, Ordering::Relaxed)), wanted)).collect();
        let subscriber =
            Arc::new(Subscriber { claims: RwLock::new(claims), gate: Gate::holding(outbox, limit_bytes), shape, bindings });
        let mut inner = self.inner.write();
        for (id, wanted) in &subscriber.bindings {
            inner.index.subscribe(*id, wanted.binding.clone());
            inner.by_id.insert(*id, (subscriber.clone(), wanted.client_id));
        }
        drop(inner);
        SubscriptionHandle { subscriber, registry: self.clone() }
    }

    /// Each subscriber that wants the change, once, with the ids of its bindings that match.
    pub fn wanting(&self, change: &Change) -> Vec<(Arc<Subscriber>, Vec<u32>)> {
        let inner = self.inner.read();
        let mut found = Vec::new();
        inner.index.subscriptions(change, &mut found);
        // Ids are given out in order, so a subscriber's bindings stand together.
        found.sort_unstable();
        let mut wanting: Vec<(Arc<Subscriber>, Vec<u32>)> = Vec::new();
        for (subscriber, client_id) in found.iter().filter_map(|id| inner.by_id.get(id)) {
            match wanting.last_mut() {
                Some((last, ids)) if Arc::ptr_eq(last, subscriber) => {
                    if !ids.contains(client_id) {
                        ids.push(*client_id);
                    }
                }
                _ => wanting.push((subscriber.clone(), vec![*client_id])),
            }
        }
        wanting
    }

    pub fn of_table(&self, table: &Table) -> Vec<Arc<Subscriber>> {
        let inner = self.inner.read();
        let mut found = Vec::new();
        inner.index.of_table(table, &mut found);
        unique(found.iter().filter_map(|id| inner.by_id.get(id)).map(|(subscriber, _)| subscriber))
    }

    pub fn all(&self) -> Vec<Arc<Subscriber>> {
        unique(self.inner.read().by_id.values().map(|(subscriber, _)| subscriber))
    }

    /// Bindings that are live now.
    pub fn count(&self) -> usize {
        self.inner.read().index.len()
    }
}

fn unique<'a>(subscribers: impl Iterator<Item = &'a Arc<Subscriber>>) -> Vec<Arc<Subscriber>> {
    let by_address: HashMap<_, _> = subscribers.map(|subscriber| (Arc::as_ptr(subscriber), subscriber.clone())).collect();
    by_address.into_values().collect()
}

impl Drop for SubscriptionHandle {
    fn drop(&mut self) {
        let mut inner = self.registry.inner.write();
        for (id, _) in &self.subscriber.bindings {
            inner.index.unsubscribe(*id);
            inner.by_id.remove(id);
        }
    }
}
