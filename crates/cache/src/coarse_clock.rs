//! The time for reads, without asking the system for it each time.
//!
//! One thread of the process notes the time every few milliseconds. A read takes that note while the deadline in
//! question is still well ahead, and asks the system itself once it is near: so an entry ends at its very
//! millisecond, and only a thread that was kept from running for longer than [`MARGIN_MS`] could make it end later.
//! Called by the judgement of every read. Stores take the exact time.

use std::{
    sync::{
        Once,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crate::entry::now_ms;

const TICK: Duration = Duration::from_millis(10);
/// Twenty-five ticks: a thread delayed for longer means a machine that answers nobody in time.
const MARGIN_MS: u64 = 250;

/// 0 before the first tick, and for ever where no thread could be had.
static NOTED_MS: AtomicU64 = AtomicU64::new(0);

/// Starts the thread if nobody has yet. Without it every read asks the system: slower, never wrong.
pub(crate) fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let tick = || {
            loop {
                NOTED_MS.store(now_ms(), Ordering::Relaxed);
                thread::sleep(TICK);
            }
        };
        if let Err(error) = thread::Builder::new().name("walcast-clock".into()).spawn(tick) {
            tracing::warn!(%error, "no thread for the coarse clock: each read of the cache asks the system for the time");
        }
    });
}

/// Unix milliseconds, exact where `deadline` is near or over, a few ticks old where it is not.
pub(crate) fn now_towards(deadline: u64) -> u64 {
    exact_if_near(NOTED_MS.load(Ordering::Relaxed), deadline, now_ms)
}

fn exact_if_near(noted: u64, deadline: u64, exact: impl FnOnce() -> u64) -> u64 {
    if noted == 0 || noted.saturating_add(MARGIN_MS) >= deadline { exact() } else { noted }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_note_is_taken_only_while_the_deadline_is_far() {
        let asked = |noted, deadline| exact_if_near(noted, deadline, || 77);
        assert_eq!(asked(10_000, 10_000 + MARGIN_MS + 1), 10_000);
        assert_eq!(asked(10_000, 10_000 + MARGIN_MS), 77, "near");
        assert_eq!(asked(10_000, 9_000), 77, "over");
        assert_eq!(asked(0, u64::MAX), 77, "nobody ticks");
        assert_eq!(asked(u64::MAX - 1, u64::MAX), 77);
    }

    #[test]
    fn the_thread_notes_the_time_and_goes_on_noting_it() {
        start();
        start();
        let began = now_ms();
        let give_up = std::time::Instant::now() + Duration::from_secs(60);
        while now_towards(u64::MAX) < began + 30 {
            assert!(std::time::Instant::now() < give_up, "the note stands still");
            thread::yield_now();
        }
        assert!(now_towards(u64::MAX) <= now_ms());
    }
}
