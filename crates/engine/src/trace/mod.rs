//! An operator's taps: what happens on one topic, one connection or one table, for a bounded time, in a bounded ring.
//!
//! The pipeline and the registry tell what happens; while nothing is tapped that is one atomic load. Values of rows are
//! [`mask`]ed unless the config permits them (`realtime.trace_payloads`).

mod changes;
mod mask;

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use walcast_model::TableName;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tapped {
    Topic(String),
    Connection(u64),
    Table(TableName),
}

impl Tapped {
    fn takes(&self, event: &Happened<'_>) -> bool {
        match self {
            Tapped::Topic(topic) => topic == event.topic,
            Tapped::Connection(id) => *id == event.connection,
            Tapped::Table(table) => event.table == Some(table),
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Tapped::Topic(topic) => json!({ "topic": topic }),
            Tapped::Connection(id) => json!({ "connection": id }),
            Tapped::Table(table) => json!({ "table": table.to_string() }),
        }
    }
}

/// One thing that happened to one subscriber or connection.
#[derive(Clone, Copy)]
pub(crate) struct Happened<'a> {
    pub kind: &'static str,
    pub connection: u64,
    /// Empty for what concerns the connection as a whole.
    pub topic: &'a str,
    pub table: Option<&'a TableName>,
    pub position: Option<&'a dyn std::fmt::Display>,
    pub bytes: usize,
    /// When its change was committed, in microseconds since 1970.
    pub committed_at_us: Option<i64>,
    pub detail: Option<&'a str>,
    pub payload: Option<&'a [u8]>,
}

impl Happened<'_> {
    pub fn of<'b>(kind: &'static str, connection: u64, topic: &'b str) -> Happened<'b> {
        Happened {
            kind,
            connection,
            topic,
            table: None,
            position: None,
            bytes: 0,
            committed_at_us: None,
            detail: None,
            payload: None,
        }
    }
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TraceError {
    #[error("there are {TAPS} traces already")]
    TooMany,
    #[error("a trace runs for 1 to {LONGEST_S} s")]
    Time,
}

pub const LONGEST_S: u64 = 600;
/// At once, those that have ended and may still be read among them.
const TAPS: usize = 16;
/// Of one trace; the oldest leave first, and are counted.
const EVENTS: usize = 5_000;
const BYTES: usize = 2 << 20;
/// How long a trace may be read after its end.
const KEPT: Duration = Duration::from_secs(1_800);

pub struct Traces {
    /// Those that still run, or have not been found to have ended.
    running: AtomicUsize,
    next: AtomicU64,
    taps: Mutex<Vec<Arc<Tap>>>,
    /// Whether values may be shown.
    permitted: bool,
}

struct Tap {
    id: u64,
    what: Tapped,
    payloads: bool,
    began: Instant,
    until: Instant,
    ring: Mutex<Ring>,
}

#[derive(Default)]
struct Ring {
    events: VecDeque<(Value, usize)>,
    bytes: usize,
    lost: u64,
}

impl Traces {
    pub fn new(permitted: bool) -> Traces {
        Traces { running: AtomicUsize::new(0), next: AtomicU64::new(1), taps: Mutex::default(), permitted }
    }

    /// Begins a trace and says its id.
    pub fn tap(&self, what: Tapped, seconds: u64, payloads: bool) -> Result<u64, TraceError> {
        if !(1..=LONGEST_S).contains(&seconds) {
            return Err(TraceError::Time);
        }
        let (began, id) = (Instant::now(), self.next.fetch_add(1, Relaxed));
        let mut taps = self.taps.lock();
        taps.retain(|tap| tap.until + KEPT > began);
        if taps.len() >= TAPS {
            // Who has ended gives way to who begins.
            let ended = taps.iter().position(|tap| tap.until <= began).ok_or(TraceError::TooMany)?;
            taps.remove(ended);
        }
        let until = began + Duration::from_secs(seconds);
        taps.push(Arc::new(Tap { id, what, payloads, began, until, ring: Mutex::default() }));
        self.count(&taps);
        Ok(id)
    }

    /// Ends it and forgets what it holds.
    pub fn end(&self, id: u64) -> bool {
        let mut taps = self.taps.lock();
        let before = taps.len();
        taps.retain(|tap| tap.id != id);
        self.count(&taps);
        taps.len() < before
    }

    pub fn report(&self, id: u64) -> Option<Value> {
        let tap = self.taps.lock().iter().find(|tap| tap.id == id).cloned()?;
        Some(self.tap_json(&tap, true))
    }

    /// All of them; with their events only where they are asked for.
    pub fn reports(&self, events: bool) -> Vec<Value> {
        let taps = self.taps.lock().clone();
        taps.iter().map(|tap| self.tap_json(tap, events)).collect()
    }

    /// Is it worth telling? While nothing is tapped this is all that a trace costs.
    pub(crate) fn is_on(&self) -> bool {
        self.running.load(Relaxed) > 0
    }

    pub(crate) fn happened(&self, event: Happened<'_>) {
        let now = Instant::now();
        let taps = self.taps.lock().clone();
        let mut ended = false;
        for tap in &taps {
            if tap.until <= now {
                ended = true;
            } else if tap.what.takes(&event) {
                tap.ring.lock().push(self.event_json(tap, &event, now));
            }
        }
        if ended {
            self.count(&self.taps.lock());
        }
    }

    fn count(&self, taps: &[Arc<Tap>]) {
        let now = Instant::now();
        self.running.store(taps.iter().filter(|tap| tap.until > now).count(), Relaxed);
    }

    fn event_json(&self, tap: &Tap, event: &Happened<'_>, now: Instant) -> Value {
        let mut shown = json!({ "event": event.kind, "after_ms": now.duration_since(tap.began).as_micros() as f64 / 1e3 });
        let mut say = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                shown[name] = value;
            }
        };
        say("connection", Some(event.connection.into()));
        say("topic", (!event.topic.is_empty()).then(|| event.topic.into()));
        say("table", event.table.map(|table| table.to_string().into()));
        say("position", event.position.map(|position| position.to_string().into()));
        say("bytes", (event.bytes > 0).then(|| event.bytes.into()));
        say("latency_ms", event.committed_at_us.map(|at_us| ((now_us() - at_us).max(0) as f64 / 1e3).into()));
        say("detail", event.detail.map(Value::from));
        if tap.payloads {
            say("payload", event.payload.map(|payload| mask::shown(payload, self.permitted)));
        }
        shown
    }

    fn tap_json(&self, tap: &Tap, events: bool) -> Value {
        let now = Instant::now();
        let payloads = match (tap.payloads, self.permitted) {
            (false, _) => "none",
            (true, false) => "masked",
            (true, true) => "shown",
        };
        let ring = tap.ring.lock();
        let mut report = json!({
            "id": tap.id,
            "tapped": tap.what.to_json(),
            "running": tap.until > now,
            "seconds_left": tap.until.saturating_duration_since(now).as_secs(),
            "payloads": payloads,
            "count": ring.events.len(),
            // The ring was full: the oldest have left.
            "lost": ring.lost,
        });
        if events {
            report["events"] = ring.events.iter().map(|(event, _)| event.clone()).collect();
        }
        report
    }
}

impl Ring {
    fn push(&mut self, event: Value) {
        // As text; what it takes in memory is a few times that.
        let bytes = event.to_string().len();
        self.bytes += bytes;
        self.events.push_back((event, bytes));
        while self.events.len() > EVENTS || self.bytes > BYTES {
            let Some((_, bytes)) = self.events.pop_front() else { return };
            self.bytes -= bytes;
            self.lost += 1;
        }
    }
}

fn now_us() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_hears_its_own_and_nobody_pays_when_there_is_none() {
        let traces = Traces::new(false);
        assert!(!traces.is_on());
        let topic = traces.tap(Tapped::Topic("realtime:a".into()), 60, false).unwrap();
        let connection = traces.tap(Tapped::Connection(7), 60, false).unwrap();
        let table = traces.tap(Tapped::Table(TableName::new("public", "plain")), 60, false).unwrap();
        assert!(traces.is_on());
        let plain = TableName::new("public", "plain");
        traces.happened(Happened { table: Some(&plain), ..Happened::of("delivered", 7, "realtime:a") });
        traces.happened(Happened::of("join", 8, "realtime:a"));
        traces.happened(Happened::of("join", 8, "realtime:b"));
        let counts = [topic, connection, table].map(|id| traces.report(id).unwrap()["count"].as_u64().unwrap());
        assert_eq!(counts, [2, 1, 1]);
        assert!([topic, connection, table].iter().all(|id| traces.end(*id)) && !traces.end(topic));
        assert!(!traces.is_on() && traces.report(topic).is_none());
    }

    #[test]
    fn p7_a_flood_fills_a_ring_and_no_more() {
        let traces = Traces::new(true);
        let id = traces.tap(Tapped::Connection(1), 60, true).unwrap();
        let payload = serde_json::to_vec(&json!({ "record": { "text": "x".repeat(3_000) } })).unwrap();
        (0..2_000).for_each(|_| traces.happened(Happened { payload: Some(&payload), ..Happened::of("delivered", 1, "t") }));
        let report = traces.report(id).unwrap();
        assert_eq!(report["count"].as_u64().unwrap() + report["lost"].as_u64().unwrap(), 2_000);
        let held: usize = report["events"].as_array().unwrap().iter().map(|event| event.to_string().len()).sum();
        assert!(held <= BYTES, "{held}");
        assert!((1..TAPS).all(|_| traces.tap(Tapped::Connection(1), 60, false).is_ok()));
        assert_eq!(traces.tap(Tapped::Connection(1), 60, false), Err(TraceError::TooMany));
        assert_eq!(traces.tap(Tapped::Connection(1), 601, false), Err(TraceError::Time));
    }
}
