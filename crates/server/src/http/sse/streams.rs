//! Which streams there are now, by what they listen to: at most so many of one user on one resource, and the statistics.
//!
//! A stream counts until its [`OpenStream`] is dropped; a resource that nobody listens to is forgotten.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::http::limits::{Limit, LimitRefusal, full};

/// Resources that a report names, those with the most streams.
const REPORTED: usize = 100;

#[derive(Debug)]
pub struct Streams {
    /// 0: no limit.
    most: u64,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    by_resource: HashMap<Arc<str>, Listened>,
    last: u64,
    refused: u64,
}

/// All streams of one resource.
#[derive(Debug, Default)]
struct Listened {
    by_user: HashMap<Arc<str>, u64>,
    /// Ids grow, so the first is the oldest.
    since: BTreeMap<u64, Instant>,
    delivered: Arc<AtomicU64>,
    refused: u64,
}

/// One stream, for as long as it is held.
#[derive(Debug)]
pub struct OpenStream {
    streams: Arc<Streams>,
    resource: Arc<str>,
    user: Arc<str>,
    id: u64,
    delivered: Arc<AtomicU64>,
}

impl OpenStream {
    pub fn delivered(&self, changes: u64) {
        self.delivered.fetch_add(changes, Ordering::Relaxed);
    }
}

impl Streams {
    pub fn new(most: u64) -> Streams {
        Streams { most, inner: Mutex::default() }
    }

    pub fn open(self: &Arc<Self>, resource: &str, user: &str) -> Result<OpenStream, LimitRefusal> {
        let mut inner = self.inner.lock();
        let resource: Arc<str> = resource.into();
        let user: Arc<str> = user.into();
        let listened = inner.by_resource.entry(resource.clone()).or_default();
        let count = listened.by_user.entry(user.clone()).or_default();
        if self.most > 0 && *count >= self.most {
            listened.refused += 1;
            inner.refused += 1;
            return Err(full(Limit::StreamsPerResource, self.most));
        }
        *count += 1;
        let delivered = listened.delivered.clone();
        inner.last += 1;
        let id = inner.last;
        if let Some(listened) = inner.by_resource.get_mut(&resource) {
            listened.since.insert(id, Instant::now());
        }
        metrics::gauge!("walcast_sse_streams").increment(1.0);
        Ok(OpenStream { streams: self.clone(), resource, user, id, delivered })
    }

    pub fn report(&self) -> Value {
        let inner = self.inner.lock();
        let mut all: Vec<_> = inner.by_resource.iter().collect();
        all.sort_unstable_by(|(a, one), (b, other)| other.since.len().cmp(&one.since.len()).then_with(|| a.cmp(b)));
        let resources: Vec<_> = all.iter().take(REPORTED).map(|(resource, listened)| listened.report(resource)).collect();
        json!({
            "streams": inner.by_resource.values().map(|listened| listened.since.len()).sum::<usize>(),
            "max_streams_per_resource": self.most,
            "refused": inner.refused,
            "resources_listened_to": inner.by_resource.len(),
            "resources": resources,
        })
    }
}

impl Listened {
    fn report(&self, resource: &str) -> Value {
        json!({
            "resource": resource,
            "streams": self.since.len(),
            "users": self.by_user.len(),
            "delivered": self.delivered.load(Ordering::Relaxed),
            "refused": self.refused,
            "oldest_s": self.since.first_key_value().map_or(0, |(_, since)| since.elapsed().as_secs()),
        })
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut inner = self.streams.inner.lock();
        let Some(listened) = inner.by_resource.get_mut(&self.resource) else { return };
        listened.since.remove(&self.id);
        if let Some(count) = listened.by_user.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                listened.by_user.remove(&self.user);
            }
        }
        if listened.since.is_empty() {
            inner.by_resource.remove(&self.resource);
        }
        metrics::gauge!("walcast_sse_streams").decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p7_a_user_has_so_many_streams_on_one_resource_and_others_have_theirs() {
        let streams = Arc::new(Streams::new(2));
        let held: Vec<_> = (0..2).map(|_| streams.open("t?id=eq.7", "ada").unwrap()).collect();
        let refusal = streams.open("t?id=eq.7", "ada").unwrap_err();
        assert!(refusal.to_string().contains("sse.max_streams_per_resource = 2"), "{refusal}");
        let _others = (streams.open("t?id=eq.7", "bob").unwrap(), streams.open("t?id=eq.8", "ada").unwrap());
        held[0].delivered(3);
        let report = streams.report();
        assert_eq!(report["streams"], 4);
        assert_eq!(report["resources"][0]["resource"], "t?id=eq.7");
        let first = &report["resources"][0];
        assert_eq!(
            (&first["streams"], &first["users"], &first["delivered"], &first["refused"]),
            (&json!(3), &json!(2), &json!(3), &json!(1))
        );
        drop(held);
        assert!(streams.open("t?id=eq.7", "ada").is_ok(), "there is room again");
    }

    #[test]
    fn p9_what_nobody_listens_to_is_forgotten() {
        let streams = Arc::new(Streams::new(0));
        let held: Vec<_> = (0..100).map(|n| streams.open(&format!("t?id=eq.{n}"), "ada").unwrap()).collect();
        assert_eq!(streams.report()["streams"], 100);
        drop(held);
        assert_eq!((&streams.report()["streams"], &streams.report()["resources_listened_to"]), (&json!(0), &json!(0)));
    }
}
