//! The latest slow queries, for the operator: which, as whom, how long, and the plan for any parameters. Never a value.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde_json::{Value, json};

const KEPT: usize = 100;

pub struct SlowQueries {
    from: Duration,
    latest: Mutex<VecDeque<Slow>>,
}

struct Slow {
    at_ms: u64,
    name: String,
    role: String,
    took: Duration,
    rows: usize,
    /// How many questions were answered together.
    questions: usize,
    plan: Arc<Value>,
}

impl SlowQueries {
    pub fn new(from: Duration) -> SlowQueries {
        SlowQueries { from, latest: Mutex::default() }
    }

    pub fn note(&self, name: &str, role: &str, took: Duration, rows: usize, questions: usize, plan: &Arc<Value>) {
        if took < self.from {
            return;
        }
        metrics::counter!("walcast_slow_queries_total").increment(1);
        tracing::warn!(query = name, role, took_ms = took.as_millis() as u64, rows, questions, "slow query");
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let (name, role, plan) = (name.to_owned(), role.to_owned(), plan.clone());
        let mut latest = self.latest.lock();
        latest.truncate(KEPT - 1);
        latest.push_front(Slow { at_ms, name, role, took, rows, questions, plan });
    }

    pub fn report(&self) -> Value {
        let latest = self.latest.lock();
        let one = |slow: &Slow| {
            json!({
                "at_ms": slow.at_ms,
                "query": slow.name,
                "role": slow.role,
                "took_ms": slow.took.as_secs_f64() * 1e3,
                "rows": slow.rows,
                "questions": slow.questions,
                "plan": &*slow.plan,
            })
        };
        json!({ "from_ms": self.from.as_millis() as u64, "slow": latest.iter().map(one).collect::<Vec<_>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_hundred_are_kept_and_what_is_quick_is_not() {
        let slow = SlowQueries::new(Duration::from_millis(100));
        let plan = Arc::new(json!([]));
        for n in 0..150 {
            slow.note(&format!("q{n}"), "anon", Duration::from_millis(100 + n), 1, 1, &plan);
            slow.note("quick", "anon", Duration::from_millis(99), 1, 1, &plan);
        }
        let report = slow.report();
        let kept = report["slow"].as_array().unwrap();
        assert_eq!((kept.len(), &kept[0]["query"], &kept[99]["query"]), (100, &json!("q149"), &json!("q50")));
    }
}
