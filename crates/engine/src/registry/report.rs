//! The registry as JSON for operators: a page of connections or subscriptions, leaks, and the whole in figures.

use std::{collections::HashMap, net::IpAddr};

use serde_json::{Value, json};

use super::{Connection, LeakKind, Listed, Registry, State};

/// Which ones, in which order, and which page of them.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    pub tenant: Option<String>,
    pub app: Option<String>,
    pub component: Option<String>,
    pub ip: Option<IpAddr>,
    pub state: Option<State>,
    /// Subscriptions only.
    pub topic: Option<String>,
    pub connection: Option<u64>,
    pub sort: Sort,
    pub offset: usize,
    pub limit: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sort {
    /// As they came.
    #[default]
    Id,
    /// The fullest first.
    Outbox,
    /// The oldest first.
    Age,
}

impl Selection {
    pub const MOST: usize = 1_000;
    pub const USUAL: usize = 100;

    fn takes(&self, connection: &Connection) -> bool {
        self.ip.is_none_or(|ip| ip == connection.peer) && self.connection.is_none_or(|id| id == connection.id)
    }

    fn is_of(&self, owner: &super::Owner, tenants: &[&Option<Box<str>>]) -> bool {
        let same = |wanted: &Option<String>, name: &Option<Box<str>>| wanted.is_none() || wanted.as_deref() == name.as_deref();
        same(&self.app, &owner.app)
            && same(&self.component, &owner.component)
            && tenants.iter().any(|tenant| same(&self.tenant, tenant))
    }

    /// Sorts, cuts the page out, and says how many there are in all.
    fn page<T>(&self, mut found: Vec<(u64, T)>) -> (usize, Vec<T>) {
        // The key stands for the chosen order; where it is equal, as they came.
        found.sort_by_key(|(key, _)| *key);
        let total = found.len();
        let limit = if self.limit == 0 { Selection::USUAL } else { self.limit.min(Selection::MOST) };
        (total, found.into_iter().skip(self.offset).take(limit).map(|(_, item)| item).collect())
    }

    fn key(&self, id: u64, since_ms: u64, connection: &Connection) -> u64 {
        match self.sort {
            Sort::Id => id,
            Sort::Outbox => u64::MAX - connection.queued().1 as u64,
            Sort::Age => since_ms,
        }
    }
}

impl Registry {
    pub fn connections_report(&self, which: &Selection) -> Value {
        let now_ms = self.now_ms();
        let mut found = Vec::new();
        self.each(|connection| {
            let tenants = connection.with_listed(|listed| listed.iter().map(|entry| entry.identity()).collect::<Vec<_>>());
            let tenants: Vec<_> =
                std::iter::once(&connection.identity.tenant).chain(tenants.iter().map(|who| &who.tenant)).collect();
            let state = || connection.state(now_ms);
            if which.takes(connection)
                && which.is_of(&connection.owner, &tenants)
                && which.state.is_none_or(|wanted| wanted == state())
            {
                found.push((which.key(connection.id, connection.since_ms, connection), connection.clone()));
            }
        });
        let (total, page) = which.page(found);
        let page: Vec<Value> = page.iter().map(|connection| self.connection_json(connection, now_ms)).collect();
        json!({ "total": total, "offset": which.offset, "connections": page })
    }

    pub fn subscriptions_report(&self, which: &Selection) -> Value {
        let now_ms = self.now_ms();
        let mut found = Vec::new();
        self.each(|connection| {
            if !which.takes(connection) {
                return;
            }
            for entry in connection.listed() {
                let who = entry.identity();
                let topic = which.topic.as_deref().is_none_or(|topic| topic == &*entry.topic);
                let state = || self.state_of(connection, &entry, now_ms);
                if topic && which.is_of(&entry.owner, &[&who.tenant]) && which.state.is_none_or(|wanted| wanted == state()) {
                    found.push((which.key(entry.id, entry.since_ms, connection), (connection.clone(), entry)));
                }
            }
        });
        let (total, page) = which.page(found);
        let page: Vec<Value> = page.iter().map(|(connection, entry)| self.listed_json(connection, entry, now_ms)).collect();
        json!({ "total": total, "offset": which.offset, "subscriptions": page })
    }

    pub fn leaks_report(&self) -> Value {
        let (leaks, counts) = self.leaks();
        let counts: serde_json::Map<String, Value> =
            counts.into_iter().map(|(kind, count)| (kind.as_str().to_owned(), count.into())).collect();
        json!({ "counts": counts, "leaks": leaks.iter().map(|leak| leak.to_json()).collect::<Vec<_>>() })
    }

    /// Counts of all, for the health of the whole.
    pub fn summary(&self) -> Value {
        const TENANTS: usize = 50;
        let now_ms = self.now_ms();
        let (mut frames, mut bytes, mut largest) = (0, 0, 0);
        let mut states: HashMap<&str, usize> = HashMap::new();
        let mut kinds: HashMap<&str, usize> = HashMap::new();
        let mut tenants: HashMap<Option<Box<str>>, (usize, usize)> = HashMap::new();
        let mut round_trips = Vec::new();
        self.each(|connection| {
            let (queued, queued_bytes) = connection.queued();
            (frames, bytes, largest) = (frames + queued, bytes + queued_bytes, largest.max(queued_bytes));
            *states.entry(connection.state(now_ms).as_str()).or_default() += 1;
            *kinds.entry(connection.kind.as_str()).or_default() += 1;
            tenants.entry(connection.identity.tenant.clone()).or_default().0 += 1;
            for entry in connection.listed() {
                tenants.entry(entry.identity().tenant.clone()).or_default().1 += 1;
            }
            round_trips.extend(connection.round_trip());
        });
        round_trips.sort_unstable();
        let round_trip = |part: f64| {
            let at = (round_trips.len() as f64 * part).ceil() as usize;
            round_trips.get(at.saturating_sub(1)).map(|took| took.as_micros() as f64 / 1e3)
        };
        let all_tenants = tenants.len();
        let mut tenants: Vec<_> = tenants.into_iter().collect();
        tenants.sort_unstable_by_key(|(_, (connections, subscriptions))| std::cmp::Reverse(connections + subscriptions));
        let tenants: Vec<Value> = tenants
            .into_iter()
            .take(TENANTS)
            .map(|(tenant, (connections, subscriptions))| {
                json!({ "tenant": tenant, "connections": connections, "subscriptions": subscriptions })
            })
            .collect();
        let leaks: serde_json::Map<String, Value> =
            self.leaks().1.into_iter().map(|(kind, count)| (kind.as_str().to_owned(), count.into())).collect();
        json!({
            "connections": self.connections(),
            "subscriptions": self.subscriptions(),
            "kinds": kinds,
            "states": states,
            "queues": { "frames": frames, "bytes": bytes, "largest_bytes": largest },
            "round_trip": { "p50_ms": round_trip(0.5), "p99_ms": round_trip(0.99), "measured": round_trips.len() },
            "leaks": leaks,
            "tenants": tenants,
            "tenants_in_all": all_tenants,
        })
    }

    /// Brings the gauges up to date; called when metrics are read.
    pub fn refresh_metrics(&self) {
        let (mut frames, mut bytes) = (0, 0);
        self.each(|connection| {
            let queued = connection.queued();
            (frames, bytes) = (frames + queued.0, bytes + queued.1);
        });
        metrics::gauge!("walcast_outbox_frames").set(frames as f64);
        metrics::gauge!("walcast_outbox_bytes").set(bytes as f64);
        metrics::gauge!("walcast_topics").set(self.subscriptions() as f64);
        for (kind, count) in self.leaks().1 {
            metrics::gauge!("walcast_leaks", "kind" => kind.as_str()).set(count as f64);
        }
    }

    fn connection_json(&self, connection: &Connection, now_ms: u64) -> Value {
        let (frames, bytes) = connection.queued();
        json!({
            "id": connection.id,
            "kind": connection.kind.as_str(),
            "state": connection.state(now_ms).as_str(),
            "app": connection.owner.app,
            "component": connection.owner.component,
            "tenant": connection.identity.tenant,
            "role": connection.identity.role,
            "subject": connection.identity.subject,
            "ip": connection.peer,
            "since_ms": self.unix_ms(connection.since_ms),
            "age_s": now_ms.saturating_sub(connection.since_ms) / 1000,
            "heard_ago_ms": connection.quiet(now_ms).as_millis() as u64,
            "round_trip_ms": connection.round_trip().map(|took| took.as_micros() as f64 / 1e3),
            "errors": connection.errors(),
            "outbox": { "frames": frames, "bytes": bytes },
            "subscriptions": connection.with_listed(<[_]>::len),
        })
    }

    fn listed_json(&self, connection: &Connection, entry: &Listed, now_ms: u64) -> Value {
        let (frames, bytes) = connection.queued();
        let ((delivered, dropped), who) = (entry.counts(), entry.identity());
        json!({
            "id": entry.id,
            "connection": connection.id,
            "topic": &*entry.topic,
            "bindings": serde_json::from_str::<Value>(&entry.bindings).unwrap_or_default(),
            "state": self.state_of(connection, entry, now_ms).as_str(),
            "leak": entry.leak().map(LeakKind::as_str),
            "app": entry.owner.app,
            "component": entry.owner.component,
            "tenant": who.tenant,
            "role": who.role,
            "subject": who.subject,
            "ip": connection.peer,
            "since_ms": self.unix_ms(entry.since_ms),
            "age_s": now_ms.saturating_sub(entry.since_ms) / 1000,
            "heard_ago_ms": connection.quiet(now_ms).as_millis() as u64,
            "delivered": delivered,
            "dropped": dropped,
            "outbox": { "frames": frames, "bytes": bytes },
        })
    }

    /// A subscription is as stale as its connection; slow, where something of it was dropped; leaking by itself.
    fn state_of(&self, connection: &Connection, entry: &Listed, now_ms: u64) -> State {
        match connection.state(now_ms) {
            State::Stale => State::Stale,
            State::Slow => State::Slow,
            _ if entry.counts().1 > 0 => State::Slow,
            _ if entry.leak().is_some() => State::Leaking,
            _ => State::Healthy,
        }
    }
}
