//! Holds commits until a snapshot of the primary sees them, then hands them on in LSN order.
//!
//! A commit can be streamed before it is visible. Whoever is told of it must find it, so announcing waits here;
//! invalidating has happened already. Bounded in bytes and time: past the bound everybody is told to
//! read again, the rows are let go, and once the commit settles everybody is told so.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use walcast_model::{Lsn, Snapshot, Xid};

use crate::{
    Core,
    pipeline::{Announcement, InFlight, Intake},
    progress::Unsettled,
};

const PAUSE_FIRST: Duration = Duration::from_micros(500);
const PAUSE_MOST: Duration = Duration::from_millis(20);
/// A commit that is just becoming visible takes less.
const BLINK: Duration = Duration::from_millis(500);
/// Commits that one announcement carries at most.
const BATCH: usize = 2_000;

struct Queue {
    core: Arc<Core>,
    held: VecDeque<InFlight>,
    bytes: usize,
    head_since: Instant,
    /// The newest snapshot, and the stream that it belongs to. What it sees stays visible, so it settles whatever it can
    /// before another is asked for: a backlog is drained with one.
    seen: Option<(u64, Snapshot)>,
    /// Set while the bound is exceeded.
    overrun: Option<Overrun>,
}

/// The rows were let go; what remains is which transactions are still invisible, a handful.
struct Overrun {
    waiting: Vec<Xid>,
    last: Lsn,
}

pub async fn run(core: Arc<Core>, mut inbox: mpsc::Receiver<Intake>, announce: mpsc::Sender<Announcement>) {
    let mut queue = Queue { core, held: VecDeque::new(), bytes: 0, head_since: Instant::now(), seen: None, overrun: None };
    let mut pause = PAUSE_FIRST;
    loop {
        if queue.is_empty() {
            match inbox.recv().await {
                Some(message) => queue.take(message, &announce).await,
                None => return,
            }
        }
        while queue.held.len() < BATCH {
            match inbox.try_recv() {
                Ok(message) => queue.take(message, &announce).await,
                Err(_) => break,
            }
        }
        if queue.is_empty() {
            continue;
        }
        if queue.settle_seen(&announce).await {
            continue;
        }
        let stream = queue.core.progress.streams();
        let moved = match queue.core.sampler.fresh().await {
            Ok(sample) => {
                queue.core.progress.note_xmax(sample.snapshot.xmax);
                let moved = queue.settle(&sample.snapshot, &announce).await;
                queue.seen = Some((stream, sample.snapshot));
                moved
            }
            Err(error) => {
                tracing::debug!(%error, "no snapshot; commits wait");
                // Nobody was asked: an outage says nothing about visibility.
                queue.head_since = Instant::now();
                false
            }
        };
        queue.bound(&announce).await;
        if moved || queue.is_empty() {
            pause = PAUSE_FIRST;
            continue;
        }
        tokio::select! {
            message = inbox.recv() => match message {
                Some(message) => queue.take(message, &announce).await,
                None => return,
            },
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE_MOST);
    }
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.held.is_empty() && self.overrun.is_none()
    }

    async fn take(&mut self, message: Intake, announce: &mpsc::Sender<Announcement>) {
        match message {
            Intake::Commit(mut commit) => match &mut self.overrun {
                // Its rows are let go at once; only its place in the order is kept.
                Some(overrun) => {
                    self.core.give_up_cascades(&commit);
                    self.core.give_up_suspects(&mut commit);
                    overrun.waiting.push(commit.xid);
                    overrun.last = commit.commit.lsn;
                }
                None => {
                    if self.held.is_empty() {
                        self.head_since = Instant::now();
                    }
                    self.bytes += commit.commit.size_bytes;
                    self.held.push_back(commit);
                }
            },
            Intake::NewEpoch { from, reason } => {
                self.held.clear();
                self.bytes = 0;
                self.overrun = None;
                self.core.progress.note_unsettled(None);
                let _ = announce.send(Announcement::NewEpoch { from, reason }).await;
            }
        }
    }

    /// After a loss of the stream transaction ids may be used again: an older snapshot says nothing then.
    async fn settle_seen(&mut self, announce: &mpsc::Sender<Announcement>) -> bool {
        match self.seen.take() {
            Some((stream, snapshot)) if stream == self.core.progress.streams() => {
                let moved = self.settle(&snapshot, announce).await;
                self.seen = Some((stream, snapshot));
                moved
            }
            _ => false,
        }
    }

    /// Hands on what the snapshot sees, up to the first commit that it does not.
    async fn settle(&mut self, snapshot: &Snapshot, announce: &mpsc::Sender<Announcement>) -> bool {
        if let Some(overrun) = &mut self.overrun {
            overrun.waiting.retain(|xid| !snapshot.sees(*xid));
            if !overrun.waiting.is_empty() {
                return false;
            }
            let at = overrun.last;
            self.overrun = None;
            self.core.progress.note_settled(at);
            self.core.progress.note_unsettled(None);
            tracing::info!(lsn = %at, "the overdue commits have settled");
            let _ = announce.send(Announcement::Resync { reason: "settled", at }).await;
            return true;
        }
        let visible = self.held.iter().take_while(|commit| snapshot.sees(commit.xid)).count();
        if visible == 0 {
            return false;
        }
        let mut settled: Vec<InFlight> = self.held.drain(..visible).collect();
        self.bytes -= settled.iter().map(|commit| commit.commit.size_bytes).sum::<usize>();
        self.head_since = Instant::now();
        if let Some(last) = settled.last() {
            self.core.progress.note_settled(last.commit.lsn);
        }
        self.core.judge(&mut settled).await;
        let _ = announce.send(Announcement::Commits(settled)).await;
        true
    }

    async fn bound(&mut self, announce: &mpsc::Sender<Announcement>) {
        let limits = &self.core.config.stream;
        let Some((xid, lsn)) = self.held.front().map(|head| (head.xid, head.commit.lsn)) else { return };
        // Bytes alone say nothing: two large commits may arrive within the blink that one needs to become visible.
        let waited = self.head_since.elapsed();
        if waited > BLINK {
            // What is in doubt holds promises back, and this may take as long as a standby does.
            self.held.iter_mut().for_each(|commit| self.core.give_up_suspects(commit));
        }
        let too_much = self.bytes > limits.settle_bytes && waited > BLINK;
        if !too_much && waited <= limits.settle_timeout {
            return;
        }
        tracing::error!(
            %xid, %lsn, held_bytes = self.bytes,
            "a commit is streamed but not visible; is a synchronous standby away? Subscribers are told to resync"
        );
        self.core.progress.note_unsettled(Some(Unsettled { xid, lsn, since: self.head_since }));
        self.core.metrics.unsettled.increment(1);
        let last = self.held.back().map_or(lsn, |commit| commit.commit.lsn);
        self.held.iter().for_each(|commit| self.core.give_up_cascades(commit));
        self.overrun = Some(Overrun { waiting: self.held.drain(..).map(|commit| commit.xid).collect(), last });
        self.bytes = 0;
        let _ = announce.send(Announcement::Resync { reason: "unsettled", at: self.core.progress.taken().lsn }).await;
    }
}
