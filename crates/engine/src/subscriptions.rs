//! Who is subscribed to what, right now. A subscription lives exactly as long as its handle: dropping it removes everything.

use std::{
    collections::{HashMap, HashSet},
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use parking_lot::RwLock;
use walcast_hub::{Gate, Place};
use walcast_matcher::{Binding, Index, SubscriptionId, Wants};
use walcast_model::{Change, Claims, Epoch, Table};
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

/// Who hears the same in the same words: equal wishes, equal claims, equal shape. It is matched, judged and encoded for once.
pub struct Audience {
    pub claims: Claims,
    pub shape: Shape,
    wanted: Vec<Arc<Wanted>>,
    /// Under which the index knows `wanted`, in order.
    first: u64,
    members: RwLock<Vec<Arc<Subscriber>>>,
}

/// One of an audience.
pub struct Subscriber {
    pub gate: Gate,
    /// Its place in the audience's list.
    slot: AtomicUsize,
    /// Where its deliveries are counted.
    pub listed: Arc<Listed>,
}

/// One binding and the id under which the client knows it.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Wanted {
    pub binding: Binding,
    pub client_id: u32,
    /// The filters in SQL, over the row's columns: for what the matcher cannot tell.
    pub expression: Arc<str>,
}

/// The bindings of one audience that want, or may want, a change, and show the same columns of it.
pub type Wanting = Vec<(Arc<Wanted>, Wants)>;

impl Audience {
    pub fn is_expired(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.claims.expires_at() <= now
    }

    /// An index of this audience alone, for a replay.
    pub fn own_index(&self) -> Index {
        let mut index = Index::default();
        self.ids().zip(&self.wanted).for_each(|(id, wanted)| index.subscribe(id, wanted.binding.clone()));
        index
    }

    /// What was found in [`Audience::own_index`].
    pub fn wanting(&self, found: &[(SubscriptionId, Wants)]) -> Vec<Wanting> {
        let mut by_select: Vec<Wanting> = Vec::new();
        for (id, wanted) in self.ids().zip(&self.wanted) {
            if let Some((_, wants)) = found.iter().find(|(found, _)| *found == id) {
                add(&mut by_select, wanted.clone(), *wants);
            }
        }
        by_select
    }

    /// Frames in order of their places, for everybody; how many went into outboxes, and how many were owed to connections
    /// that have ended. Whoever is behind reads them later.
    pub fn offer(&self, places: &[Place], frames: &[Bytes]) -> (u64, u64) {
        let (mut delivered, mut dropped) = (0, 0);
        for member in self.members.read().iter() {
            match member.gate.offer(places, frames) {
                Some(taken) => {
                    member.listed.delivered(taken as u64);
                    delivered += taken as u64;
                }
                None => {
                    member.listed.dropped(frames.len() as u64);
                    dropped += frames.len() as u64;
                }
            }
        }
        (delivered, dropped)
    }

    /// Frames that nobody is sent any more: the token has expired. How many.
    pub fn drop_frames(&self, frames: u64) -> u64 {
        let members = self.members.read();
        for member in members.iter() {
            member.listed.dropped(frames);
            // Whoever brings a new token hears them after all.
            member.gate.lapse();
        }
        frames * members.len() as u64
    }

    /// What belongs to no place in the order. How many were told.
    pub fn tell(&self, frame: &Bytes) -> u64 {
        self.members.read().iter().filter(|member| member.gate.tell(frame.clone())).count() as u64
    }

    pub fn each_listed(&self, call: impl Fn(&Listed)) {
        self.members.read().iter().for_each(|member| call(&member.listed));
    }

    fn ids(&self) -> impl Iterator<Item = SubscriptionId> {
        (self.first..).map(SubscriptionId).take(self.wanted.len())
    }

    fn enter(&self, subscriber: Arc<Subscriber>) {
        let mut members = self.members.write();
        subscriber.slot.store(members.len(), Ordering::Relaxed);
        members.push(subscriber);
    }

    /// True if nobody is left.
    fn leave(&self, subscriber: &Subscriber) -> bool {
        let mut members = self.members.write();
        let slot = subscriber.slot.load(Ordering::Relaxed);
        members.swap_remove(slot);
        if let Some(moved) = members.get(slot) {
            moved.slot.store(slot, Ordering::Relaxed);
        }
        if members.len() < members.capacity() / 4 {
            members.shrink_to_fit();
        }
        members.is_empty()
    }
}

/// An audience by what makes it one.
struct Alike(Arc<Audience>);

impl PartialEq for Alike {
    fn eq(&self, other: &Alike) -> bool {
        let (a, b) = (&self.0, &other.0);
        a.claims.exact() == b.claims.exact() && a.shape == b.shape && a.wanted == b.wanted
    }
}

impl Eq for Alike {}

impl Hash for Alike {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.0.claims.exact(), &self.0.shape, &self.0.wanted).hash(state);
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
    audiences: HashSet<Alike>,
    by_id: HashMap<SubscriptionId, Arc<Audience>>,
    bindings: usize,
}

/// Owns a subscription. Dropping it unsubscribes.
pub struct SubscriptionHandle {
    pub subscriber: Arc<Subscriber>,
    pub audience: Arc<Audience>,
    /// That it was opened in.
    pub epoch: Epoch,
    subscriptions: Arc<Subscriptions>,
}

impl Subscriptions {
    /// Registered first, answered later: from here on its `gate`, which holds, is offered whatever matches.
    pub fn register(
        self: &Arc<Self>,
        claims: Claims,
        shape: Shape,
        wanted: Vec<Wanted>,
        gate: Gate,
        listed: Arc<Listed>,
    ) -> SubscriptionHandle {
        // In one piece: an audience's bindings stand together, also where many join at once.
        let first = self.next.fetch_add(wanted.len() as u64, Ordering::Relaxed);
        let wanted: Vec<_> = wanted.into_iter().map(Arc::new).collect();
        let subscriber = Arc::new(Subscriber { gate, slot: AtomicUsize::new(0), listed });
        let alike = Alike(Arc::new(Audience { claims, shape, wanted, first, members: RwLock::default() }));
        let mut inner = self.inner.write();
        inner.bindings += alike.0.wanted.len();
        let audience = match inner.audiences.get(&alike) {
            Some(Alike(audience)) => audience.clone(),
            None => {
                let audience = alike.0.clone();
                for (id, wanted) in audience.ids().zip(&audience.wanted) {
                    inner.index.subscribe(id, wanted.binding.clone());
                    inner.by_id.insert(id, audience.clone());
                }
                inner.audiences.insert(alike);
                audience
            }
        };
        audience.enter(subscriber.clone());
        drop(inner);
        SubscriptionHandle { subscriber, audience, epoch: Epoch::default(), subscriptions: self.clone() }
    }

    /// Each audience that wants the change, or may want it: once for each choice of columns among its bindings.
    pub fn wanting(&self, change: &Change) -> Vec<(Arc<Audience>, Wanting)> {
        let inner = self.inner.read();
        let mut found = Vec::new();
        inner.index.subscriptions(change, &mut found);
        // Ids are given out in order, so an audience's bindings stand together.
        found.sort_unstable();
        let mut wanting: Vec<(Arc<Audience>, Wanting)> = Vec::new();
        let mut of_one: Vec<Wanting> = Vec::new();
        let mut last: Option<&Arc<Audience>> = None;
        for (id, wants) in found {
            let Some(audience) = inner.by_id.get(&id) else { continue };
            if let Some(before) = last.filter(|last| !Arc::ptr_eq(last, audience)) {
                wanting.extend(of_one.drain(..).map(|of_one| (before.clone(), of_one)));
            }
            last = Some(audience);
            let Some(wanted) = audience.wanted.get((id.0 - audience.first) as usize) else { continue };
            add(&mut of_one, wanted.clone(), wants);
        }
        if let Some(last) = last {
            wanting.extend(of_one.into_iter().map(|of_one| (last.clone(), of_one)));
        }
        wanting
    }

    pub fn of_table(&self, table: &Table) -> Vec<Arc<Audience>> {
        let inner = self.inner.read();
        let mut found = Vec::new();
        inner.index.of_table(table, &mut found);
        let audiences = found.iter().filter_map(|id| inner.by_id.get(id));
        let by_address: HashMap<_, _> = audiences.map(|audience| (Arc::as_ptr(audience), audience.clone())).collect();
        by_address.into_values().collect()
    }

    pub fn all(&self) -> Vec<Arc<Audience>> {
        self.inner.read().audiences.iter().map(|Alike(audience)| audience.clone()).collect()
    }

    /// Bindings that are live now.
    pub fn count(&self) -> usize {
        self.inner.read().bindings
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

impl Drop for SubscriptionHandle {
    fn drop(&mut self) {
        // Nothing more goes to whoever has left, also of what is being announced just now.
        self.subscriber.gate.shut();
        let mut inner = self.subscriptions.inner.write();
        inner.bindings -= self.audience.wanted.len();
        if self.audience.leave(&self.subscriber) {
            for id in self.audience.ids() {
                inner.index.unsubscribe(id);
                inner.by_id.remove(&id);
            }
            inner.audiences.remove(&Alike(self.audience.clone()));
        }
    }
}
