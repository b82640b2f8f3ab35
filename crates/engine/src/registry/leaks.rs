//! What looks like a leak in an application: subscriptions that are opened and never closed.
//!
//! A look goes over the whole registry, ten times in a window (`realtime.leak_window`). It marks the entries, keeps the
//! findings for `/admin/v1/leaks`, counts them for `walcast_leaks`, and logs each once.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};

use super::{Connection, Listed, Owner, Registry};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LeakKind {
    /// A component whose subscriptions only become more.
    Growing,
    /// The same subscription several times in one connection.
    Duplicate,
    /// A topic without bindings that was never sent anything.
    Unheard,
}

impl LeakKind {
    pub const ALL: [LeakKind; 3] = [LeakKind::Growing, LeakKind::Duplicate, LeakKind::Unheard];

    pub fn as_str(self) -> &'static str {
        match self {
            LeakKind::Growing => "growing",
            LeakKind::Duplicate => "duplicate",
            LeakKind::Unheard => "unheard",
        }
    }

    fn sentence(self) -> &'static str {
        match self {
            LeakKind::Growing => "the subscriptions of a component only become more; /admin/v1/leaks tells more",
            LeakKind::Duplicate => "one connection has the same subscription more than once; /admin/v1/leaks tells which",
            LeakKind::Unheard => "a topic without bindings was never sent anything; /admin/v1/leaks tells which",
        }
    }

    pub(super) fn code(self) -> u8 {
        self as u8 + 1
    }

    pub(super) fn from_code(code: u8) -> Option<LeakKind> {
        LeakKind::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// One finding, in words.
#[derive(Debug, Clone)]
pub struct Leak {
    pub kind: LeakKind,
    pub owner: Arc<Owner>,
    /// None for what is true of a component as a whole.
    pub connection: Option<u64>,
    pub topic: Option<Arc<str>>,
    pub subscriptions: usize,
    pub text: String,
}

impl Leak {
    pub fn to_json(&self) -> Value {
        json!({
            "kind": self.kind.as_str(),
            "app": self.owner.app,
            "component": self.owner.component,
            "connection": self.connection,
            "topic": self.topic.as_deref(),
            "subscriptions": self.subscriptions,
            "text": self.text,
        })
    }
}

/// Looks of one window.
pub(super) const LOOKS: usize = 10;
/// Fewer more are no finding.
const GROWTH: usize = 10;
/// Findings that are kept in words; all are counted.
const KEPT: usize = 1_000;
/// Components that are watched for growth: those with most subscriptions.
const WATCHED: usize = 1_000;

/// Of the looks so far.
#[derive(Default)]
pub(super) struct Found {
    pub leaks: Vec<Leak>,
    /// By kind, those that are not kept in words among them.
    pub counts: [usize; LeakKind::ALL.len()],
    history: HashMap<Arc<Owner>, VecDeque<Seen>>,
    logged: HashSet<Finding>,
}

/// What makes a finding the same one as before.
type Finding = (LeakKind, Option<u64>, Arc<Owner>, Option<Arc<str>>);

/// What one look saw of a component.
#[derive(Debug, Clone, Copy)]
struct Seen {
    subscriptions: usize,
    /// Different people, or addresses where nobody says who he is.
    clients: usize,
}

#[derive(Default)]
struct Component {
    subscriptions: usize,
    clients: HashSet<(Option<Box<str>>, IpAddr)>,
    entries: Vec<Arc<Listed>>,
}

impl Registry {
    /// Of the last look.
    pub fn leaks(&self) -> (Vec<Leak>, Vec<(LeakKind, usize)>) {
        let found = self.leaks.lock();
        let counts = LeakKind::ALL.iter().map(|kind| (*kind, found.counts[*kind as usize])).collect();
        (found.leaks.clone(), counts)
    }

    /// One look. `window` is how long something may be so before it is called a leak.
    pub(super) fn look_for_leaks(&self, window: Duration) {
        let now_ms = self.now_ms();
        let mut components: HashMap<Arc<Owner>, Component> = HashMap::new();
        let (mut leaks, mut counts) = (Vec::new(), [0; LeakKind::ALL.len()]);
        let mut marked: HashMap<u64, LeakKind> = HashMap::new();
        let mut find = |leak: Leak| {
            counts[leak.kind as usize] += 1;
            if leaks.len() < KEPT {
                leaks.push(leak);
            }
        };
        self.each(|connection| {
            let listed = connection.listed();
            for entry in &listed {
                let component = components.entry(entry.owner.clone()).or_default();
                component.subscriptions += 1;
                component.clients.insert((connection.identity.subject.clone(), connection.peer));
                component.entries.push(entry.clone());
            }
            unheard(connection, &listed, now_ms, window).for_each(|(entry, leak)| {
                marked.insert(entry, LeakKind::Unheard);
                find(leak);
            });
            duplicates(connection, &listed).into_iter().for_each(|(entries, leak)| {
                marked.extend(entries.into_iter().map(|entry| (entry, LeakKind::Duplicate)));
                find(leak);
            });
        });
        let mut found = self.leaks.lock();
        let mut history = std::mem::take(&mut found.history);
        let mut watched: Vec<_> = components.iter().collect();
        watched.sort_unstable_by_key(|(_, component)| std::cmp::Reverse(component.subscriptions));
        watched.truncate(WATCHED);
        for (owner, component) in watched {
            let mut seen = history.remove(owner).unwrap_or_default();
            seen.push_back(Seen { subscriptions: component.subscriptions, clients: component.clients.len() });
            if seen.len() > LOOKS {
                seen.pop_front();
            }
            if let Some(leak) = growing(owner, &seen, window) {
                marked.extend(component.entries.iter().map(|entry| (entry.id, LeakKind::Growing)));
                find(leak);
            }
            found.history.insert(owner.clone(), seen);
        }
        for entry in components.values().flat_map(|component| &component.entries) {
            entry.set_leak(marked.get(&entry.id).copied());
        }
        let key = |leak: &Leak| (leak.kind, leak.connection, leak.owner.clone(), leak.topic.clone());
        let keys: HashSet<_> = leaks.iter().map(key).collect();
        for leak in leaks.iter().filter(|leak| !found.logged.contains(&key(leak))) {
            let (app, component) = (leak.owner.app.as_deref(), leak.owner.component.as_deref());
            // Topics and filters name patients: they are for `/admin/v1/leaks`, not for the log.
            let (kind, subscriptions) = (leak.kind.as_str(), leak.subscriptions);
            tracing::warn!(kind, app, component, connection = leak.connection, subscriptions, "a leak: {}", leak.kind.sentence());
        }
        (found.leaks, found.counts, found.logged) = (leaks, counts, keys);
    }
}

/// Topics that nothing comes to, and nothing can: no bindings, nothing delivered for a whole window.
fn unheard<'a>(
    connection: &'a Connection,
    listed: &'a [Arc<Listed>],
    now_ms: u64,
    window: Duration,
) -> impl Iterator<Item = (u64, Leak)> + 'a {
    let old = move |entry: &&Arc<Listed>| now_ms.saturating_sub(entry.since_ms) >= window.as_millis() as u64;
    listed.iter().filter(|entry| entry.sameness == 0 && entry.counts().0 == 0).filter(old).map(move |entry| {
        let minutes = now_ms.saturating_sub(entry.since_ms) / 60_000;
        let text = format!(
            "topic {} has no bindings and was sent nothing in {minutes} min: leave it when the component that joined it goes",
            entry.topic
        );
        let (owner, topic) = (entry.owner.clone(), Some(entry.topic.clone()));
        (entry.id, Leak { kind: LeakKind::Unheard, owner, connection: Some(connection.id), topic, subscriptions: 1, text })
    })
}

fn duplicates(connection: &Connection, listed: &[Arc<Listed>]) -> Vec<(Vec<u64>, Leak)> {
    let mut same: HashMap<u64, Vec<&Arc<Listed>>> = HashMap::new();
    for entry in listed.iter().filter(|entry| entry.sameness != 0) {
        same.entry(entry.sameness).or_default().push(entry);
    }
    let several = same.into_values().filter(|entries| entries.len() > 1);
    several
        .map(|entries| {
            let first = entries[0];
            let topics: Vec<&str> = entries.iter().take(3).map(|entry| &*entry.topic).collect();
            let text = format!(
                "{} topics of one connection listen to the same ({}{}): {}. Share one channel, or remove it with its component",
                entries.len(),
                topics.join(", "),
                if entries.len() > topics.len() { ", …" } else { "" },
                first.bindings
            );
            let leak = Leak {
                kind: LeakKind::Duplicate,
                owner: first.owner.clone(),
                connection: Some(connection.id),
                topic: Some(first.topic.clone()),
                subscriptions: entries.len(),
                text,
            };
            (entries.iter().map(|entry| entry.id).collect(), leak)
        })
        .collect()
}

/// Never fewer in a whole window, many more in the end, and more for each client: a crowd that comes in the morning is no leak.
fn growing(owner: &Arc<Owner>, seen: &VecDeque<Seen>, window: Duration) -> Option<Leak> {
    let (first, last) = (seen.front()?, seen.back()?);
    let never_fewer = seen.iter().zip(seen.iter().skip(1)).all(|(a, b)| b.subscriptions >= a.subscriptions);
    let more = last.subscriptions.saturating_sub(first.subscriptions);
    // A fifth more for each client: last/clients >= 1.2 * first/clients, without fractions.
    let each_more = last.subscriptions * first.clients.max(1) * 5 >= first.subscriptions * last.clients.max(1) * 6;
    if seen.len() < LOOKS || !never_fewer || more < GROWTH || !each_more {
        return None;
    }
    let named = |name: &Option<Box<str>>| name.as_deref().unwrap_or("without a name").to_owned();
    let text = format!(
        "subscriptions of component {} of app {} only become more: from {} to {} in {} min, from {} clients to {}. \
         Is every channel removed when its component goes?",
        named(&owner.component),
        named(&owner.app),
        first.subscriptions,
        last.subscriptions,
        (window.as_secs_f64() / 60.0 * 10.0).round() / 10.0,
        first.clients,
        last.clients,
    );
    let (kind, subscriptions) = (LeakKind::Growing, last.subscriptions);
    Some(Leak { kind, owner: owner.clone(), connection: None, topic: None, subscriptions, text })
}
