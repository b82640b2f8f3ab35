//! Which of our own tasks does not get on, since when and why. Written by the task itself, read by `/readyz`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

#[derive(Debug, Default)]
pub struct Stuck(Mutex<BTreeMap<&'static str, (Instant, String)>>);

impl Stuck {
    /// The last try failed. The time counts from the first of those that failed in a row.
    pub fn note(&self, task: &'static str, why: String) {
        let mut tasks = self.0.lock();
        tasks.entry(task).or_insert_with(|| (Instant::now(), String::new())).1 = why;
    }

    pub fn over(&self, task: &'static str) {
        self.0.lock().remove(task);
    }

    pub fn all(&self) -> Vec<(&'static str, Duration, String)> {
        self.0.lock().iter().map(|(task, (since, why))| (*task, since.elapsed(), why.clone())).collect()
    }
}
