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
use walcast_matcher::{Binding, Index, SubscriptionId, Wants};
use walcast_model::{Change, Claims, Table};
use walcast_protocol::phoenix::Vsn;

use crate::registry::Listed;

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

pub struct Subscriber {
    claims: RwLock<Claims>,
    pub gate: Gate,
    pub shape: Shape,
    pub listed: Arc<Listed>,
    bindings: Vec<(SubscriptionId, Arc<Wanted>)>,
}

/// One binding and the id under which the client knows it.
#[derive(Debug)]
pub struct Wanted {
    pub binding: Binding,
    pub client_id: u32,
    /// The filters in SQL, over the row's columns: for what the matcher cannot tell.
    pub expression: Arc<str>,
}

/// The bindings of one subscriber that want, or may want, a change, and show the same columns of it.
pub type Wanting = Vec<(Arc<Wanted>, Wants)>;

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

    /// An index of this subscriber alone, for its replay.
    pub fn own_index(&self) -> Index {
        let mut index = Index::default();
        self.bindings.iter().for_each(|(id, wanted)| index.subscribe(*id, wanted.binding.clone()));
        index
    }

    /// What was found in [`Subscriber::own_index`].
    pub fn wanting(&self, found: &[(SubscriptionId, Wants)]) -> Vec<Wanting> {
        let mut by_select: Vec<Wanting> = Vec::new();
        for (id, wanted) in &self.bindings {
            if let Some((_, wants)) = found.iter().find(|(found, _)| found == id) {
                add(&mut by_select, wanted.clone(), *wants);
            }
        }
        by_select
    }

    pub fn offer(&self, place: Place, frames: impl IntoIterator<Item = Bytes>) -> bool {
        self.gate.offer(place, frames)
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
    by_id: HashMap<SubscriptionId, (Arc<Subscriber>, Arc<Wanted>)>,
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
        listed: Arc<Listed>,
    ) -> SubscriptionHandle {
        // In one piece: a subscriber's bindings stand together, also where many join at once.
        let first = self.next.fetch_add(wanted.len() as u64, Ordering::Relaxed);
        let bindings: Vec<_> = (first..).map(SubscriptionId).zip(wanted.into_iter().map(Arc::new)).collect();
        let subscriber = Arc::new(Subscriber {
            claims: RwLock::new(claims),
            gate: Gate::holding(outbox, limit_bytes),
            shape,
            listed,
            bindings,
        });
        let mut inner = self.inner.write();
        for (id, wanted) in &subscriber.bindings {
            inner.index.subscribe(*id, wanted.binding.clone());
            inner.by_id.insert(*id, (subscriber.clone(), wanted.clone()));
        }
        drop(inner);
        SubscriptionHandle { subscriber, registry: self.clone() }
    }

    /// Each subscriber that wants the change, or may want it: once for each choice of columns among its bindings.
    pub fn wanting(&self, change: &Change) -> Vec<(Arc<Subscriber>, Wanting)> {
        let inner = self.inner.read();
        let mut found = Vec::new();
        inner.index.subscriptions(change, &mut found);
        // Ids are given out in order, so a subscriber's bindings stand together.
        found.sort_unstable();
        let mut wanting: Vec<(Arc<Subscriber>, Wanting)> = Vec::new();
        let mut of_one: Vec<Wanting> = Vec::new();
        let mut last: Option<&Arc<Subscriber>> = None;
        for (id, wants) in found {
            let Some((subscriber, wanted)) = inner.by_id.get(&id) else { continue };
            if let Some(before) = last.filter(|last| !Arc::ptr_eq(last, subscriber)) {
                wanting.extend(of_one.drain(..).map(|of_one| (before.clone(), of_one)));
            }
            last = Some(subscriber);
            add(&mut of_one, wanted.clone(), wants);
        }
        if let Some(last) = last {
            wanting.extend(of_one.into_iter().map(|of_one| (last.clone(), of_one)));
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

/// Bindings that the client knows by one id say the same: the surer one counts.
fn add(by_select: &mut Vec<Wanting>, wanted: Arc<Wanted>, wants: Wants) {
    let same = |wanting: &&mut Wanting| wanting.first().is_some_and(|(other, _)| other.binding.select == wanted.binding.select);
    match by_select.iter_mut().find(same) {
        Some(wanting) => match wanting.iter_mut().find(|(other, _)| other.client_id == wanted.client_id) {
            Some((_, before)) => *before = wants.min(*before),
            None => wanting.push((wanted, wants)),
        },
        None => by_select.push(vec![(wanted, wants)]),
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
