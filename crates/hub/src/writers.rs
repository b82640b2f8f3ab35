//! Writes what outboxes hold straight into their sockets: a few threads, no task wake per connection.
//!
//! Whatever is pushed while a thread is busy, or while a [`Turn`] lasts, goes out in one write per socket. A busy thread
//! pauses up to 5 ms between its rounds, so that more comes together; an idle one does not wait. A socket that is full is
//! left alone until its connection's task says that it takes bytes again.

use std::{
    io::{ErrorKind, IoSlice},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tokio::{net::TcpStream, sync::Notify};

use crate::outbox::{CloseReason, Drain, FRAME_BYTES, Outbox, OutboxLimits, State, close};

/// The last words on a connection, as its protocol has them.
pub type Goodbye = fn(&CloseReason) -> Option<Bytes>;

/// Hears how long ago, in microseconds, a commit was made whose changes have just been written.
pub type OnWritten = Arc<dyn Fn(u64) + Send + Sync>;

/// The threads end when this is dropped.
pub struct Writers {
    shards: Vec<Arc<Shard>>,
    next: AtomicUsize,
}

#[derive(Debug)]
pub(crate) struct SocketDrain {
    socket: Arc<TcpStream>,
    pub(crate) shard: Arc<Shard>,
    goodbye: Goodbye,
    pub(crate) attention: Notify,
}

/// The connection's side of an outbox that is written by [`Writers`]; there is one. Dropping it closes outbox and socket.
#[derive(Debug)]
pub struct SocketEnd {
    outbox: Outbox,
    pub socket: Arc<TcpStream>,
}

/// What the connection's task has to do for its outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Wait until the socket takes bytes, then [`SocketEnd::retry`].
    Blocked,
    /// There is room again for those who had more than fitted.
    Room,
    /// The last word is said: close the socket.
    Finished,
}

#[derive(Debug)]
pub(crate) struct Shard {
    due: Mutex<Due>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Due {
    outboxes: Vec<Outbox>,
    /// When the commits were made whose changes are due, in microseconds since 1970.
    committed_at_us: Vec<u64>,
    turns: usize,
    waiting: bool,
    ended: bool,
}

/// While it lasts, threads that rest are not woken. Dropping it wakes them.
pub struct Turn<'a> {
    writers: &'a Writers,
    committed_at_us: Vec<u64>,
}

/// More is written in the next round, and so is what comes meanwhile.
const PAUSE: Duration = Duration::from_millis(5);
/// A thread rests so many times as long as it has written.
const REST: u32 = 4;
/// Frames in one write.
const AT_ONCE: usize = 64;

impl Writers {
    pub fn start(threads: usize, on_written: OnWritten) -> std::io::Result<Writers> {
        let shards: Vec<Arc<Shard>> =
            (0..threads.max(1)).map(|_| Arc::new(Shard { due: Mutex::default(), wake: Condvar::new() })).collect();
        for (number, shard) in shards.iter().enumerate() {
            let (shard, on_written) = (shard.clone(), on_written.clone());
            thread::Builder::new().name(format!("writer-{number}")).spawn(move || shard.run(&on_written))?;
        }
        Ok(Writers { shards, next: AtomicUsize::new(0) })
    }

    /// An outbox that is written straight into `socket`, which nobody else writes to.
    pub fn outbox(&self, limits: OutboxLimits, socket: TcpStream, goodbye: Goodbye) -> (Outbox, SocketEnd) {
        let socket = Arc::new(socket);
        let shard = self.shards[self.next.fetch_add(1, Ordering::Relaxed) % self.shards.len()].clone();
        let drain = SocketDrain { socket: socket.clone(), shard, goodbye, attention: Notify::new() };
        let outbox = Outbox::with(limits, Drain::Socket(drain));
        (outbox.clone(), SocketEnd { outbox, socket })
    }

    pub fn turn(&self, committed_at_us: Vec<u64>) -> Turn<'_> {
        self.shards.iter().for_each(|shard| shard.due.lock().turns += 1);
        Turn { writers: self, committed_at_us }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        for shard in &self.writers.shards {
            let mut due = shard.due.lock();
            due.turns -= 1;
            // It may be writing just this.
            if !due.outboxes.is_empty() || !due.waiting {
                due.committed_at_us.extend(&self.committed_at_us);
                shard.wake_if_waiting(&mut due);
            }
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        for shard in &self.shards {
            shard.due.lock().ended = true;
            shard.wake.notify_one();
        }
    }
}

impl Shard {
    pub(crate) fn add(&self, outbox: Outbox) {
        let mut due = self.due.lock();
        due.outboxes.push(outbox);
        if due.turns == 0 {
            self.wake_if_waiting(&mut due);
        }
    }

    fn wake_if_waiting(&self, due: &mut Due) {
        if std::mem::take(&mut due.waiting) {
            self.wake.notify_one();
        }
    }

    fn run(&self, on_written: &OnWritten) {
        let mut round: Vec<Outbox> = Vec::new();
        let mut committed: Vec<u64> = Vec::new();
        let mut scratch: Vec<Bytes> = Vec::with_capacity(AT_ONCE);
        let mut ended_at = Instant::now();
        let mut took = Duration::ZERO;
        loop {
            let mut due = self.due.lock();
            while due.outboxes.is_empty() {
                if due.ended {
                    return;
                }
                tell(&mut due.committed_at_us, on_written);
                due.waiting = true;
                self.wake.wait(&mut due);
            }
            due.waiting = false;
            drop(due);
            let rest = (took * REST).min(PAUSE).saturating_sub(ended_at.elapsed());
            if rest > Duration::from_micros(100) {
                thread::sleep(rest);
            }
            let mut due = self.due.lock();
            std::mem::swap(&mut round, &mut due.outboxes);
            std::mem::swap(&mut committed, &mut due.committed_at_us);
            drop(due);
            let began = Instant::now();
            for outbox in round.drain(..) {
                outbox.write(&mut scratch);
            }
            // What a burst needed is not kept for the idle hours after it.
            round.shrink_to(1_024);
            ended_at = Instant::now();
            took = ended_at - began;
            tell(&mut committed, on_written);
        }
    }
}

fn tell(committed_at_us: &mut Vec<u64>, on_written: &OnWritten) {
    if !committed_at_us.is_empty() {
        let now_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        committed_at_us.drain(..).for_each(|at| on_written(now_us.saturating_sub(at)));
    }
}

impl Outbox {
    /// Only the shard's own thread calls this: nobody else writes to the socket.
    fn write(&self, scratch: &mut Vec<Bytes>) {
        let Drain::Socket(drain) = &self.0.drain else { return };
        loop {
            let mut state = self.0.state.lock();
            state.socket.due = false;
            if state.frames.is_empty() && !self.last_words(drain, &mut state) {
                return;
            }
            let many = state.frames.len().min(AT_ONCE);
            scratch.extend(state.frames.drain(..many));
            let emptied = state.frames.is_empty();
            if emptied {
                state.bytes = 0;
                // Idle connections hold no buffers.
                state.frames.shrink_to(4);
            } else {
                state.bytes = state.bytes.saturating_sub(scratch.iter().map(|frame| frame.len() + FRAME_BYTES).sum());
            }
            let mut offset = std::mem::take(&mut state.socket.offset);
            let more = state.closed.is_some() || state.wanted || state.socket.blocked.is_some();
            drop(state);

            let (written, failed) = write_all(&drain.socket, scratch, &mut offset);
            match failed {
                None if emptied && !more => return,
                None => self.0.state.lock().socket.blocked = None,
                Some(ErrorKind::WouldBlock) => {
                    let mut state = self.0.state.lock();
                    if written > 0 || state.socket.blocked.is_none() {
                        state.socket.blocked = Some(Instant::now());
                    }
                    if state.socket.cut && !state.socket.said_goodbye {
                        scratch.truncate(usize::from(offset > 0));
                    }
                    state.bytes += scratch.iter().map(|frame| frame.len() + FRAME_BYTES).sum::<usize>();
                    while let Some(frame) = scratch.pop() {
                        state.frames.push_front(frame);
                    }
                    state.socket.offset = offset;
                    drop(state);
                    drain.attention.notify_one();
                    return;
                }
                Some(_) => {
                    scratch.clear();
                    let mut state = self.0.state.lock();
                    if state.closed.is_none() {
                        close(&mut state, CloseReason::Gone);
                    }
                    state.frames.clear();
                    (state.bytes, state.socket.offset) = (0, 0);
                    state.socket.finished = true;
                    drop(state);
                    drain.attention.notify_one();
                    return;
                }
            }
        }
    }

    /// Nothing waits: is there something left to say? True if it was queued.
    fn last_words(&self, drain: &SocketDrain, state: &mut State) -> bool {
        state.socket.blocked = None;
        if let Some(reason) = &state.closed {
            if !state.socket.said_goodbye {
                state.socket.said_goodbye = true;
                if let Some(goodbye) = (drain.goodbye)(reason) {
                    state.frames.push_back(goodbye);
                    return true;
                }
            }
            state.socket.finished = true;
            drain.attention.notify_one();
        } else if state.wanted {
            drain.attention.notify_one();
        }
        false
    }
}

/// Writes and drops frames until all are gone or the socket takes no more: how many bytes went, and why not all.
/// `offset` is into the first frame that is left.
fn write_all(socket: &TcpStream, frames: &mut Vec<Bytes>, offset: &mut usize) -> (usize, Option<ErrorKind>) {
    let (mut first, mut all) = (0, 0);
    while first < frames.len() {
        let result = match &frames[first..] {
            [one] => socket.try_write(&one[*offset..]),
            many => {
                let mut slices = [IoSlice::new(&[]); AT_ONCE];
                for (at, (slice, frame)) in slices.iter_mut().zip(many).enumerate() {
                    *slice = IoSlice::new(if at == 0 { &frame[*offset..] } else { frame });
                }
                socket.try_write_vectored(&slices[..many.len().min(AT_ONCE)])
            }
        };
        match result {
            Ok(0) => return (all, Some(ErrorKind::WriteZero)),
            Ok(mut written) => {
                all += written;
                while first < frames.len() && written >= frames[first].len() - *offset {
                    written -= frames[first].len() - *offset;
                    *offset = 0;
                    first += 1;
                }
                *offset += written;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                frames.drain(..first);
                return (all, Some(error.kind()));
            }
        }
    }
    frames.clear();
    (all, None)
}

impl SocketEnd {
    /// Waits until the outbox needs the connection's task, which may be `waiting` for the socket to take bytes already.
    pub async fn attention(&self, waiting: bool) -> Attention {
        let Drain::Socket(drain) = &self.outbox.0.drain else { return Attention::Finished };
        loop {
            {
                let mut state = self.outbox.0.state.lock();
                if state.socket.finished {
                    return Attention::Finished;
                }
                if state.socket.blocked.is_some() && !state.socket.due && !waiting {
                    return Attention::Blocked;
                }
                if state.frames.is_empty() && std::mem::take(&mut state.wanted) {
                    return Attention::Room;
                }
            }
            drain.attention.notified().await;
        }
    }

    pub fn close_reason(&self) -> Option<CloseReason> {
        self.outbox.close_reason()
    }

    /// The socket takes bytes again.
    pub fn retry(&self) {
        self.outbox.retry();
    }
}

impl Drop for SocketEnd {
    fn drop(&mut self) {
        self.outbox.close(CloseReason::Gone);
        let _ = socket2::SockRef::from(&*self.socket).shutdown(std::net::Shutdown::Both);
    }
}
