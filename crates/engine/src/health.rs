//! Is it alive, is it ready, how far behind is it. Read by `/readyz` and the metrics, never by the pipeline.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use walcast_cache::Hearing;

use crate::{Core, Engine, Vital, progress::StreamState, upkeep::l2_state};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    NotReady,
}

#[derive(Debug, Clone)]
pub struct Health {
    pub readiness: Readiness,
    pub report: Value,
}

impl Engine {
    pub fn health(&self) -> Health {
        let core = &self.core;
        let mut reasons: Vec<String> = Vec::new();
        let stream = match core.progress.stream() {
            StreamState::Attached => json!({ "state": "attached" }),
            StreamState::Starting => {
                reasons.push("the stream is not attached yet".into());
                json!({ "state": "starting" })
            }
            StreamState::Away { since, why } => {
                reasons.push(format!("the stream is away: {why}"));
                json!({ "state": "away", "why": why, "since_ms": since.elapsed().as_millis() as u64 })
            }
        };
        if let Some(unsettled) = core.progress.unsettled() {
            reasons.push(format!(
                "transaction {} at {} is committed but not visible for {} s: is a synchronous standby away?",
                unsettled.xid,
                unsettled.lsn,
                unsettled.since.elapsed().as_secs()
            ));
        }
        if matches!(core.cache.hearing(), Hearing::Lost { .. }) && reasons.is_empty() {
            reasons.push("our own heartbeat has not come back through the stream".into());
        }
        let stuck: Vec<Value> = core
            .stuck
            .all()
            .into_iter()
            .map(|(task, since, why)| json!({ "task": task, "for_s": since.as_secs(), "why": why }))
            .collect();
        let (busy, idle, allowed) = core.pool.status();
        let readiness = if reasons.is_empty() { Readiness::Ready } else { Readiness::NotReady };
        let announced = core.progress.announced();
        let report = json!({
            "ready": readiness == Readiness::Ready,
            "reasons": reasons,
            "stream": stream,
            "position": announced.to_string(),
            "read_to": core.progress.read_to().to_string(),
            "invalidated_to": core.progress.invalidated().to_string(),
            "catching_up": core.progress.read_to() < core.progress.catch_up(),
            "heard_ago_ms": core.progress.heard_ago().map(|ago| ago.as_millis() as u64),
            "stuck": stuck,
            "warnings": core.warnings.lock().clone(),
            "subscriptions": core.subscriptions.count(),
            "pool": { "busy": busy, "idle": idle, "allowed": allowed },
            "cache": {
                "l1_entries": core.cache.l1_entries(),
                "l1_bytes": core.cache.l1_bytes(),
                "l2": l2_state(core.cache.l2()),
            },
            "queries": core.queries.report(),
            "uptime_s": core.started.elapsed().as_secs(),
        });
        Health { readiness, report }
    }

    /// The live side as a whole: what was delivered, how fast, what went wrong, what waits.
    pub fn realtime_report(&self) -> Value {
        let mut report = self.core.registry.summary();
        if let (Value::Object(report), Value::Object(vitals)) = (&mut report, self.core.vitals.report()) {
            report.extend(vitals);
        }
        report
    }

    /// False if there is no such connection.
    pub fn end_connection(&self, id: u64) -> bool {
        let ended = self.core.registry.end(id, "ended by an operator");
        if ended {
            self.core.vitals.count(Vital::ClosedByOperator);
            tracing::info!(connection = id, "a connection was ended by an operator");
        }
        ended
    }

    /// Brings the gauges up to date; called when metrics are read.
    pub fn refresh_gauges(&self) {
        let core = &self.core;
        core.metrics.subscriptions.set(core.subscriptions.count() as f64);
        core.vitals.refresh_metrics();
        core.registry.refresh_metrics();
        core.metrics.stream_attached.set(f64::from(u8::from(core.progress.stream() == StreamState::Attached)));
        core.metrics.replay_bytes.set(core.ring.lock().bytes() as f64);
        core.metrics.heard_ago.set(core.progress.heard_ago().map_or(-1.0, |ago| ago.as_secs_f64()));
        if let Some(sample) = core.sampler.latest(Duration::from_secs(60)) {
            core.metrics.lag_bytes.set(sample.wal_insert.bytes_since(core.progress.read_to()) as f64);
        }
        for (name, reason, value) in core.cache.stats().all() {
            match reason {
                Some(reason) => metrics::counter!(format!("walcast_cache_{name}_total"), "reason" => reason).absolute(value),
                None => metrics::counter!(format!("walcast_cache_{name}_total")).absolute(value),
            }
        }
        for room in core.cache.l1_rooms() {
            let labels = [("room", room.name), ("policy", room.policy.as_str().to_owned())];
            metrics::gauge!("walcast_cache_l1_bytes", &labels).set(room.bytes as f64);
            metrics::gauge!("walcast_cache_l1_capacity_bytes", &labels).set(room.capacity_bytes as f64);
            metrics::gauge!("walcast_cache_l1_entries", &labels).set(room.entries as f64);
        }
        if let Some(l2) = core.cache.l2() {
            metrics::gauge!("walcast_cache_l2_away").set(f64::from(u8::from(l2.is_away())));
            if let Some(size) = l2.size() {
                metrics::gauge!("walcast_cache_l2_rows").set(size.rows as f64);
                metrics::gauge!("walcast_cache_l2_bytes").set(size.bytes as f64);
            }
        }
    }
}

impl Core {
    /// A topic was told to read again.
    pub(crate) fn note_resyncs(&self, told: u64) {
        self.metrics.resyncs.increment(told);
        self.vitals.add(Vital::Resync, told);
    }

    /// Changes went into outboxes.
    pub(crate) fn note_delivered(&self, changes: u64) {
        self.metrics.delivered.increment(changes);
        self.vitals.add(Vital::Delivered, changes);
    }

    /// A change was told without being shown.
    pub(crate) fn note_withheld(&self, error: &'static str) {
        self.metrics.withheld_error(error);
        self.vitals.count(Vital::Withheld);
    }
}

/// Tells the cache whether we hear. Ten times a second: a fifth of the shortest staleness that makes sense.
pub async fn listen(core: Arc<Core>, cancel: CancellationToken) {
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => core.hearing_changed(),
        }
    }
}
