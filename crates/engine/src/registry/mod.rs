//! Every connection and every subscription that is open right now: whose it is, since when, how it fares.
//!
//! The door enters what it opens and holds a handle; dropping the handle removes the entry at once. Read by `/admin/v1/*`,
//! by the mirror for SQL and by the search for [`leaks`]; never by the pipeline, which only counts in an entry that it
//! was given. A change of one connection takes one lock of [`SHARDS`], for a few instructions.

mod connection;
mod leaks;
pub(crate) mod mirror;
mod owner;
mod report;
pub(crate) mod rounds;
mod subscription;
pub(crate) mod wheel;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use walcast_hub::{CloseReason, Outbox};
use walcast_model::Claims;

use crate::{Traces, Vital, Vitals, trace::Happened};

pub use connection::{Connection, ConnectionHandle, Kind, State};
pub use leaks::{Leak, LeakKind};
pub use owner::{Identity, OWNER_CHARACTERS, Owner};
pub use report::{Selection, Sort};
pub use subscription::{Listed, Listing};

/// A connection that nothing was heard of for so long is taken out, whatever its own task believes.
pub const STALE: Duration = Duration::from_secs(300);
const SHARDS: usize = 32;

/// What the door knows of a connection when it opens.
pub struct NewConnection<'a> {
    pub kind: Kind,
    /// As the client calls itself (`?app=…&component=…`); bounded and cleaned here.
    pub app: Option<&'a str>,
    pub component: Option<&'a str>,
    pub claims: &'a Claims,
    pub peer: IpAddr,
    pub outbox: Outbox,
}

pub struct Registry {
    tenant_claim: String,
    began: Instant,
    began_unix_ms: u64,
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Connection>>>; SHARDS],
    connections: AtomicUsize,
    subscriptions: AtomicUsize,
    owners: owner::Owners,
    gone: Mutex<Gone>,
    leaks: Mutex<leaks::Found>,
    vitals: Arc<Vitals>,
    traces: Arc<Traces>,
}

/// Rows of the mirror whose subscriptions have ended.
#[derive(Default)]
struct Gone {
    rows: Vec<u64>,
    /// More than are kept: the mirror begins anew.
    overflow: bool,
}

/// 800 KiB: what a database that is away for long may cost us.
const GONE: usize = 100_000;

impl Registry {
    pub fn new(tenant_claim: &str, vitals: Arc<Vitals>, traces: Arc<Traces>) -> Arc<Registry> {
        let began_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arc::new(Registry {
            tenant_claim: tenant_claim.to_owned(),
            began: Instant::now(),
            began_unix_ms: began_unix.as_millis() as u64,
            // Never given twice, also not by the next process: who ends connection 17 means the one that he saw.
            next: AtomicU64::new((began_unix.as_secs() & 0x7FFF_FFFF) << 20),
            shards: std::array::from_fn(|_| Mutex::default()),
            connections: AtomicUsize::new(0),
            subscriptions: AtomicUsize::new(0),
            owners: owner::Owners::default(),
            gone: Mutex::default(),
            leaks: Mutex::default(),
            vitals,
            traces,
        })
    }

    /// Enters a connection. It is listed until the handle is dropped, and everything that was listed under it with it.
    pub fn connect(self: &Arc<Self>, new: NewConnection<'_>) -> ConnectionHandle {
        let owner = self.owners.named(new.app, new.component);
        let identity = Arc::new(self.identity(new.claims));
        let connection = Arc::new(Connection::new(self.next_id(), &new, owner, identity, self.now_ms()));
        self.shard(connection.id).lock().insert(connection.id, connection.clone());
        self.connections.fetch_add(1, Relaxed);
        self.vitals.count(Vital::Opened);
        ConnectionHandle { connection, registry: self.clone() }
    }

    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    /// Topics and streams that are subscribed now, those without a binding among them.
    pub fn subscriptions(&self) -> usize {
        self.subscriptions.load(Relaxed)
    }

    pub fn find(&self, id: u64) -> Option<Arc<Connection>> {
        self.shard(id).lock().get(&id).cloned()
    }

    /// Calls for each connection, a shard at a time: nobody waits for the whole.
    pub fn each(&self, call: impl FnMut(&Arc<Connection>)) {
        self.each_from(0, call);
    }

    fn each_from(&self, first: usize, mut call: impl FnMut(&Arc<Connection>)) {
        for at in 0..SHARDS {
            let connections: Vec<_> = self.shards[(first + at) % SHARDS].lock().values().cloned().collect();
            connections.iter().for_each(&mut call);
        }
    }

    /// Ends a connection: it is out of the list at once, its client is told the reason. False if there is none.
    pub fn end(&self, id: u64, reason: &str) -> bool {
        let Some(connection) = self.find(id) else { return false };
        connection.outbox.close(CloseReason::Ended(reason.into()));
        self.forget(&connection);
        true
    }

    /// Takes out who has not been heard for [`STALE`], and closes it. How many.
    pub fn sweep(&self) -> usize {
        self.sweep_at(self.now_ms())
    }

    fn sweep_at(&self, now_ms: u64) -> usize {
        let mut ended = 0;
        self.each(|connection| {
            if connection.quiet(now_ms) >= STALE {
                connection.outbox.close(CloseReason::Ended("stale: nothing was heard for 5 minutes".into()));
                self.forget(connection);
                ended += 1;
            }
        });
        ended
    }

    /// Whom a client belongs to, as the configured claim says.
    pub fn tenant_of(&self, claims: &Claims) -> Option<String> {
        claims.at(&self.tenant_claim).and_then(|tenant| match tenant {
            serde_json::Value::String(name) => Some(name.clone()),
            serde_json::Value::Number(number) => Some(number.to_string()),
            _ => None,
        })
    }

    /// Milliseconds of this registry's life, as the entries keep them.
    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// The same, finer: what pings carry.
    fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    fn unix_ms(&self, at_ms: u64) -> u64 {
        self.began_unix_ms + at_ms
    }

    fn identity(&self, claims: &Claims) -> Identity {
        Identity {
            tenant: self.tenant_of(claims).map(Into::into),
            role: claims.role().into(),
            subject: claims.subject().map(Into::into),
        }
    }

    fn next_id(&self) -> u64 {
        self.next.fetch_add(1, Relaxed)
    }

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Connection>>> {
        &self.shards[id as usize % SHARDS]
    }

    fn enter(&self, connection: &Connection, entry: Arc<Listed>) {
        // Counted before it can be seen, and so before it can end.
        self.subscriptions.fetch_add(1, Relaxed);
        if !connection.add(entry) {
            self.subscriptions.fetch_sub(1, Relaxed);
        }
    }

    fn leave(&self, connection: &Connection, entry: &Arc<Listed>) {
        if connection.take(entry) {
            self.subscriptions.fetch_sub(1, Relaxed);
            self.note_gone(entry.is_mirrored().then_some(entry.id).into_iter());
            self.trace(Happened::of("leave", connection.id, &entry.topic));
        }
    }

    /// Once for each connection, whoever comes first: its handle, an operator or the sweep.
    fn forget(&self, connection: &Connection) {
        let mut shard = self.shard(connection.id).lock();
        if shard.remove(&connection.id).is_none() {
            return;
        }
        // A room that a storm needed is not kept for the quiet after it.
        if shard.capacity() > 64 && shard.len() < shard.capacity() / 8 {
            shard.shrink_to_fit();
        }
        drop(shard);
        self.connections.fetch_sub(1, Relaxed);
        self.trace(Happened::of("close", connection.id, ""));
        let listed = connection.take_all();
        self.subscriptions.fetch_sub(listed.len(), Relaxed);
        self.note_gone(listed.iter().filter(|entry| entry.is_mirrored()).map(|entry| entry.id));
    }

    fn has_gone(&self) -> bool {
        let gone = self.gone.lock();
        gone.overflow || !gone.rows.is_empty()
    }

    fn take_gone(&self) -> Gone {
        std::mem::take(&mut self.gone.lock())
    }

    /// Nothing stands in the table any more.
    fn forget_mirrored(&self) {
        self.each(|connection| connection.with_listed(|listed| listed.iter().for_each(|entry| entry.set_mirrored(false))));
        // Those among them whose rows were never there are deleted once more, in vain.
        self.gone.lock().overflow = false;
    }

    fn trace(&self, event: Happened<'_>) {
        if self.traces.is_on() {
            self.traces.happened(event);
        }
    }

    fn note_gone(&self, rows: impl Iterator<Item = u64>) {
        let mut gone = self.gone.lock();
        for row in rows {
            if gone.overflow || gone.rows.len() >= GONE {
                *gone = Gone { rows: Vec::new(), overflow: true };
                return;
            }
            gone.rows.push(row);
        }
    }
}

#[cfg(test)]
mod tests;
