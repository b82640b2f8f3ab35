//! How the live side fares as a whole: counts and times since the start, and of the last minute.
//!
//! Counted in by the pipeline and the door, with relaxed adds; read by `/admin/v1/realtime` and `/metrics`. A task takes a
//! sample of all every few seconds, so that the last minute is the difference of two.

mod histogram;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use histogram::{Counts, Histogram};

use crate::Core;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vital {
    /// Changes that went into an outbox.
    Delivered,
    /// Changes that were owed and not delivered: the outbox was full, the token had expired.
    Dropped,
    Opened,
    Joined,
    JoinRefused,
    MalformedFrame,
    /// Connections that were closed as too slow, as silent, by an operator.
    ClosedSlow,
    ClosedIdle,
    ClosedByOperator,
    /// Topics that were told to read again.
    Resync,
    /// Changes that were told without being shown.
    Withheld,
}

impl Vital {
    const ALL: [Vital; 11] = [
        Vital::Delivered,
        Vital::Dropped,
        Vital::Opened,
        Vital::Joined,
        Vital::JoinRefused,
        Vital::MalformedFrame,
        Vital::ClosedSlow,
        Vital::ClosedIdle,
        Vital::ClosedByOperator,
        Vital::Resync,
        Vital::Withheld,
    ];

    /// Its name among the errors, if it is one.
    pub(crate) fn error(self) -> Option<&'static str> {
        Some(match self {
            Vital::Delivered | Vital::Opened | Vital::Joined | Vital::ClosedByOperator => return None,
            Vital::Dropped => "dropped",
            Vital::JoinRefused => "join_refused",
            Vital::MalformedFrame => "malformed_frame",
            Vital::ClosedSlow => "closed_slow",
            Vital::ClosedIdle => "closed_idle",
            Vital::Resync => "resync",
            Vital::Withheld => "withheld",
        })
    }
}

const KINDS: usize = Vital::ALL.len();
const EVERY: Duration = Duration::from_secs(5);
const WINDOW: Duration = Duration::from_secs(60);

pub struct Vitals {
    counts: [AtomicU64; KINDS],
    commit_to_socket: Histogram,
    began: Instant,
    /// The oldest first; the first is a minute old once the process is.
    samples: Mutex<VecDeque<Sample>>,
}

#[derive(Clone)]
struct Sample {
    at: Instant,
    counts: [u64; KINDS],
    times: Counts,
}

impl Default for Vitals {
    fn default() -> Vitals {
        Vitals {
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            commit_to_socket: Histogram::default(),
            began: Instant::now(),
            samples: Mutex::default(),
        }
    }
}

impl Vitals {
    pub fn count(&self, what: Vital) {
        self.add(what, 1);
    }

    pub fn add(&self, what: Vital, how_many: u64) {
        self.counts[what as usize].fetch_add(how_many, Relaxed);
    }

    /// From a commit's time to the moment when its frame was written to a socket. Once for each write is enough.
    pub fn commit_to_socket(&self, took: Duration) {
        self.commit_to_socket.record(took);
    }

    pub fn report(&self) -> Value {
        let (now, first) = (self.sample(), self.samples.lock().front().cloned());
        let zero = Sample { at: self.began, counts: [0; KINDS], times: Counts::default() };
        json!({
            "last_minute": between(first.as_ref().unwrap_or(&zero), &now),
            "since_start": between(&zero, &now),
        })
    }

    /// Brings the metrics up to date; called when they are read.
    pub fn refresh_metrics(&self) {
        let now = self.sample();
        for kind in Vital::ALL {
            if let Some(name) = kind.error() {
                metrics::counter!("walcast_realtime_errors_total", "kind" => name).absolute(now.counts[kind as usize]);
            }
        }
        metrics::counter!("walcast_connections_opened_total").absolute(now.counts[Vital::Opened as usize]);
        metrics::counter!("walcast_joins_total").absolute(now.counts[Vital::Joined as usize]);
        metrics::counter!("walcast_commit_to_socket_writes_total").absolute(now.times.total());
        let window = match self.samples.lock().front() {
            Some(first) => now.times.since(&first.times),
            None => now.times,
        };
        for (name, part) in PERCENTILES {
            let seconds = window.percentile(part).map_or(0.0, |time| time.as_secs_f64());
            metrics::gauge!("walcast_commit_to_socket_seconds", "percentile" => name).set(seconds);
        }
    }

    fn sample(&self) -> Sample {
        let counts = std::array::from_fn(|kind| self.counts[kind].load(Relaxed));
        Sample { at: Instant::now(), counts, times: self.commit_to_socket.counts() }
    }

    fn keep_sample(&self) {
        let now = self.sample();
        let mut samples = self.samples.lock();
        // One of just above a minute stays, to measure against.
        while samples.get(1).is_some_and(|second| now.at.duration_since(second.at) >= WINDOW) {
            samples.pop_front();
        }
        samples.push_back(now);
    }
}

const PERCENTILES: [(&str, f64); 3] = [("p50", 0.5), ("p95", 0.95), ("p99", 0.99)];

fn between(from: &Sample, to: &Sample) -> Value {
    let count = |kind: Vital| to.counts[kind as usize].saturating_sub(from.counts[kind as usize]);
    let seconds = to.at.duration_since(from.at).as_secs_f64();
    let times = to.times.since(&from.times);
    let mut latency = Map::new();
    for (name, part) in PERCENTILES {
        latency.insert(format!("{name}_ms"), times.percentile(part).map_or(Value::Null, |time| millis(time).into()));
    }
    latency.insert("writes".into(), times.total().into());
    let errors = Vital::ALL.into_iter().filter_map(|kind| Some((kind.error()?.to_owned(), count(kind).into())));
    let (delivered, joined) = (count(Vital::Delivered), count(Vital::Joined));
    json!({
        "seconds": (seconds * 10.0).round() / 10.0,
        "delivered": delivered,
        "deliveries_per_second": if seconds > 0.0 { (delivered as f64 / seconds * 10.0).round() / 10.0 } else { 0.0 },
        "opened": count(Vital::Opened),
        "joined": joined,
        "closed_by_operator": count(Vital::ClosedByOperator),
        "success_rate": {
            "deliveries": rate(delivered, count(Vital::Dropped)),
            "joins": rate(joined, count(Vital::JoinRefused)),
        },
        "commit_to_socket": latency,
        "errors": errors.collect::<Map<String, Value>>(),
    })
}

/// None if nothing was tried.
fn rate(good: u64, bad: u64) -> Option<f64> {
    (good + bad > 0).then(|| good as f64 / (good + bad) as f64)
}

fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// Started by the engine.
pub(crate) async fn run(core: Arc<Core>, cancel: CancellationToken) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => core.vitals.keep_sample(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_minute_is_told_apart_from_the_time_before() {
        let vitals = Vitals::default();
        vitals.add(Vital::Delivered, 90);
        vitals.add(Vital::Dropped, 10);
        vitals.commit_to_socket(Duration::from_secs(2));
        vitals.keep_sample();
        vitals.add(Vital::Delivered, 5);
        vitals.commit_to_socket(Duration::from_millis(3));
        let report = vitals.report();
        assert_eq!(report["since_start"]["success_rate"]["deliveries"], 95.0 / 105.0);
        assert_eq!(report["since_start"]["errors"]["dropped"], 10);
        assert_eq!(report["last_minute"]["delivered"], 5);
        assert_eq!(report["last_minute"]["success_rate"]["deliveries"], 1.0);
        assert_eq!(report["last_minute"]["success_rate"]["joins"], Value::Null);
        assert!(report["last_minute"]["commit_to_socket"]["p99_ms"].as_f64().unwrap() < 4.0);
        assert!(report["since_start"]["commit_to_socket"]["p99_ms"].as_f64().unwrap() >= 2_000.0);
    }

    #[test]
    fn each_vital_has_a_place_of_its_own() {
        Vital::ALL.iter().enumerate().for_each(|(at, kind)| assert_eq!(*kind as usize, at));
    }
}
