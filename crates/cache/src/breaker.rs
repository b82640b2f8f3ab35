//! Spares a tier that keeps failing: after some errors in a row nobody asks it, until a single trial succeeds.
//!
//! Called by L2 around each use. Never waits.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Errors in a row that open it.
const ERRORS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(crate) struct Breaker(Mutex<State>);

#[derive(Default)]
struct State {
    errors: u32,
    /// Some while open.
    pause: Option<Pause>,
}

struct Pause {
    until: Instant,
    length: Duration,
    on_trial: bool,
}

/// Leave to use the tier once. Dropped without a verdict (the reader went away) it says nothing.
#[must_use]
pub(crate) struct Leave<'a> {
    breaker: &'a Breaker,
    trial: bool,
}

impl Breaker {
    /// None while it is open: go on without the tier.
    pub(crate) fn ask(&self, now: Instant) -> Option<Leave<'_>> {
        let mut state = self.0.lock();
        match &mut state.pause {
            None => Some(Leave { breaker: self, trial: false }),
            Some(pause) if now >= pause.until && !pause.on_trial => {
                pause.on_trial = true;
                Some(Leave { breaker: self, trial: true })
            }
            Some(_) => None,
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.0.lock().pause.is_some()
    }
}

impl Leave<'_> {
    /// True if this closed the breaker.
    pub(crate) fn succeeded(self) -> bool {
        let mut state = self.breaker.0.lock();
        // Only the trial closes it: a late answer from before it opened proves little.
        if self.trial {
            state.pause = None;
        }
        if state.pause.is_none() {
            state.errors = 0;
        }
        self.trial
    }

    /// True if this opened the breaker.
    pub(crate) fn failed(self, now: Instant) -> bool {
        let mut state = self.breaker.0.lock();
        state.errors = state.errors.saturating_add(1);
        let too_many = state.errors >= ERRORS;
        match &mut state.pause {
            Some(pause) if self.trial => {
                let length = (pause.length * 2).min(LONGEST_PAUSE);
                *pause = Pause { until: now + length, length, on_trial: false };
                false
            }
            Some(_) => false,
            None if too_many => {
                state.pause = Some(Pause { until: now + FIRST_PAUSE, length: FIRST_PAUSE, on_trial: false });
                true
            }
            None => false,
        }
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        // After a verdict the trial is over anyway; without one the next who asks may try.
        if self.trial
            && let Some(pause) = &mut self.breaker.0.lock().pause
        {
            pause.on_trial = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(breaker: &Breaker, now: Instant, times: u32) {
        for _ in 0..times {
            breaker.ask(now).unwrap().failed(now);
        }
    }

    #[test]
    fn opens_after_five_errors_in_a_row_and_not_before() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        fail(&breaker, now, 4);
        breaker.ask(now).unwrap().succeeded();
        fail(&breaker, now, 4);
        assert!(!breaker.is_open());
        fail(&breaker, now, 1);
        assert!(breaker.is_open() && breaker.ask(now).is_none());
    }

    #[test]
    fn one_trial_at_a_time_and_the_pause_doubles_up_to_30_s() {
        let (breaker, mut now) = (Breaker::default(), Instant::now());
        fail(&breaker, now, 5);
        for pause in [1, 2, 4, 8, 16, 30, 30] {
            now += Duration::from_secs(pause) - Duration::from_millis(1);
            assert!(breaker.ask(now).is_none(), "before {pause} s are over");
            now += Duration::from_millis(1);
            let trial = breaker.ask(now).unwrap();
            assert!(breaker.ask(now).is_none(), "only one trial");
            trial.failed(now);
        }
        now += Duration::from_secs(30);
        drop(breaker.ask(now).unwrap());
        assert!(breaker.ask(now).unwrap().succeeded(), "a trial without a verdict may be repeated");
        assert!(!breaker.is_open());
    }
}
