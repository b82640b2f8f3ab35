//! How far each stage of the pipeline has come: written by its stage, read by everybody.
//!
//! Order of the marks: read ≥ raised ≥ settled ≥ taken ≥ announced, and raised ≥ invalidated ≥ announced. Raised and
//! invalidated differ while a commit's cascades are looked up: see `pipeline/cascade`.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use walcast_model::{Epoch, Lsn, Position, Xid};

#[derive(Debug, Clone, PartialEq)]
pub enum StreamState {
    Starting,
    Attached,
    Away { since: Instant, why: String },
}

#[derive(Debug)]
pub struct Progress {
    read_to: watch::Sender<Lsn>,
    raised: AtomicU64,
    invalidated: AtomicU64,
    settled: AtomicU64,
    /// Xmax of the newest snapshot: what the stream's 32 bits are widened with.
    xmax: AtomicU64,
    epoch: RwLock<Epoch>,
    taken: Mutex<(Lsn, u32)>,
    announced: Mutex<(Lsn, u32)>,
    stream: watch::Sender<StreamState>,
    heard: Mutex<Option<Instant>>,
    /// WAL that was flushed when the stream was last opened: until it is read we are catching up.
    catch_up: AtomicU64,
    unsettled: Mutex<Option<Unsettled>>,
    intake_waits: AtomicBool,
    streams: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Unsettled {
    pub xid: Xid,
    pub lsn: Lsn,
    pub since: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Progress {
            read_to: watch::Sender::new(Lsn::ZERO),
            raised: AtomicU64::new(0),
            invalidated: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            xmax: AtomicU64::new(0),
            epoch: RwLock::default(),
            taken: Mutex::default(),
            announced: Mutex::default(),
            stream: watch::Sender::new(StreamState::Starting),
            heard: Mutex::new(None),
            catch_up: AtomicU64::new(0),
            unsettled: Mutex::new(None),
            intake_waits: AtomicBool::new(false),
            streams: AtomicU64::new(0),
        }
    }
}

impl Progress {
    pub fn read_to(&self) -> Lsn {
        *self.read_to.borrow()
    }

    pub fn note_read(&self, lsn: Lsn) {
        self.read_to.send_if_modified(|at| {
            let further = lsn > *at;
            *at = lsn.max(*at);
            further
        });
    }

    /// Waits until everything before `lsn` was read and invalidated. False if that takes longer than `at_most`.
    pub async fn wait_read(&self, lsn: Lsn, at_most: Duration) -> bool {
        let mut reader = self.read_to.subscribe();
        tokio::time::timeout(at_most, reader.wait_for(|at| *at >= lsn)).await.is_ok_and(|waited| waited.is_ok())
    }

    /// Commits up to here have raised what their rows say by themselves.
    pub fn raised(&self) -> Lsn {
        Lsn(self.raised.load(Ordering::Acquire))
    }

    pub fn note_raised(&self, lsn: Lsn) {
        self.raised.fetch_max(lsn.0, Ordering::AcqRel);
    }

    /// Commits up to here have raised everything: what a reader can be promised.
    pub fn invalidated(&self) -> Lsn {
        Lsn(self.invalidated.load(Ordering::Acquire))
    }

    pub fn note_invalidated(&self, lsn: Lsn) {
        self.invalidated.fetch_max(lsn.0, Ordering::AcqRel);
    }

    /// Every commit up to here is visible to any snapshot that is taken from now on.
    pub fn settled(&self) -> Lsn {
        Lsn(self.settled.load(Ordering::Acquire))
    }

    pub fn note_settled(&self, lsn: Lsn) {
        self.settled.fetch_max(lsn.0, Ordering::AcqRel);
    }

    pub fn xmax(&self) -> Xid {
        Xid(self.xmax.load(Ordering::Acquire))
    }

    pub fn note_xmax(&self, xmax: Xid) {
        self.xmax.fetch_max(xmax.0, Ordering::AcqRel);
    }

    pub fn epoch(&self) -> Epoch {
        *self.epoch.read()
    }

    /// The last commit taken off the settle queue: what a join notes.
    pub fn taken(&self) -> Position {
        let (lsn, index) = *self.taken.lock();
        Position { epoch: self.epoch(), lsn, index }
    }

    pub fn note_taken(&self, lsn: Lsn, index: u32) {
        *self.taken.lock() = (lsn, index);
    }

    /// Everything up to here has been handed to its outboxes.
    pub fn announced(&self) -> Position {
        let (lsn, index) = *self.announced.lock();
        Position { epoch: self.epoch(), lsn, index }
    }

    pub fn note_announced(&self, lsn: Lsn, index: u32) {
        *self.announced.lock() = (lsn, index);
    }

    /// A new epoch: positions before and after do not compare, so every mark begins anew.
    pub fn begin_epoch(&self, epoch: Epoch, at: Lsn) {
        *self.epoch.write() = epoch;
        self.read_to.send_replace(at);
        self.raised.store(at.0, Ordering::Release);
        self.invalidated.store(at.0, Ordering::Release);
        self.settled.store(at.0, Ordering::Release);
        *self.taken.lock() = (at, 0);
        *self.announced.lock() = (at, 0);
    }

    pub fn stream(&self) -> StreamState {
        self.stream.borrow().clone()
    }

    /// Counts losses of the stream: what was learned of transaction ids before one does not hold after it.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Acquire)
    }

    pub fn note_stream(&self, state: StreamState) {
        if matches!(state, StreamState::Away { .. }) {
            self.streams.fetch_add(1, Ordering::AcqRel);
        }
        self.stream.send_replace(state);
    }

    /// Our heartbeat written at this instant has come back.
    pub fn note_heard(&self, written: Instant) {
        *self.heard.lock() = Some(written);
    }

    pub fn note_deaf(&self) {
        *self.heard.lock() = None;
    }

    /// How old our newest heartbeat is that came back; none while the stream is lost.
    pub fn heard_ago(&self) -> Option<Duration> {
        self.heard.lock().map(|at| at.elapsed())
    }

    pub fn catch_up(&self) -> Lsn {
        Lsn(self.catch_up.load(Ordering::Acquire))
    }

    pub fn note_catch_up(&self, lsn: Lsn) {
        self.catch_up.store(lsn.0, Ordering::Release);
    }

    /// The intake waits for room behind it: whoever waits for the stream to go on would wait for himself.
    pub fn intake_waits(&self) -> bool {
        self.intake_waits.load(Ordering::Acquire)
    }

    pub fn note_intake_waits(&self, waits: bool) {
        self.intake_waits.store(waits, Ordering::Release);
    }

    pub fn unsettled(&self) -> Option<Unsettled> {
        *self.unsettled.lock()
    }

    pub fn note_unsettled(&self, unsettled: Option<Unsettled>) {
        *self.unsettled.lock() = unsettled;
    }
}
