//! Thousands of clients on one thread: `epoll`, one read for each socket that has something, frames counted where they
//! lie. So the clients take little of the machine that they share with what is measured.
//!
//! A frame with `"at_us":` in it is a delivery: from the time that stands there until it was read is its latency.
//! Clients of the realtime wire send a heartbeat every 25 s as stock clients do, spread evenly.

use std::{
    io::{ErrorKind, Read, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Context;
use hdrhistogram::Histogram;
use memchr::memmem::Finder;
use mio::{Events, Interest, Poll, Token, Waker, net::TcpStream};
use parking_lot::Mutex;

use crate::realtime::frames::{CLOSE, Frame, PING, PONG, TEXT, from_client};

/// Before the time of sending, in microseconds since 1970.
pub const SENT_AT: &str = "\"at_us\":";
const HEARTBEAT: Duration = Duration::from_secs(25);
const WAKER: Token = Token(usize::MAX);
/// One minute and more counts as that.
const LONGEST_US: u64 = 60_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Phoenix channels: heartbeats.
    Realtime,
    /// Only WebSocket.
    Plain,
}

pub struct Crowd {
    shared: Arc<Shared>,
    newcomers: mpsc::Sender<Newcomer>,
    waker: Arc<Waker>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    deliveries: AtomicU64,
    delivered_bytes: AtomicU64,
    lost: AtomicU64,
    ends: AtomicBool,
    latency: Mutex<Option<Histogram<u64>>>,
    why_lost: Mutex<Option<String>>,
}

struct Newcomer {
    stream: std::net::TcpStream,
    read: Vec<u8>,
    wire: Wire,
}

impl Crowd {
    pub fn gather() -> anyhow::Result<Crowd> {
        let poll = Poll::new().context("epoll")?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let shared = Arc::new(Shared::default());
        let (newcomers, arrivals) = mpsc::channel();
        let mut listening = Listening {
            poll,
            arrivals,
            shared: shared.clone(),
            clients: Vec::new(),
            buffer: vec![0; 256 << 10],
            sent_at: Finder::new(SENT_AT).into_owned(),
            latency: new_histogram()?,
            next_heartbeat: 0,
            heartbeats_since: Instant::now(),
        };
        let thread = thread::Builder::new().name("crowd".into()).spawn(move || {
            if let Err(error) = listening.run() {
                listening.shared.note_lost(format!("the crowd has ended: {error:#}"));
            }
        })?;
        Ok(Crowd { shared, newcomers, waker, thread: Some(thread) })
    }

    pub fn add(&self, (stream, read): (std::net::TcpStream, Vec<u8>), wire: Wire) -> anyhow::Result<()> {
        self.newcomers.send(Newcomer { stream, read, wire }).ok().context("the crowd has ended")?;
        Ok(self.waker.wake()?)
    }

    pub fn deliveries(&self) -> u64 {
        self.shared.deliveries.load(Ordering::Acquire)
    }

    pub fn delivered_bytes(&self) -> u64 {
        self.shared.delivered_bytes.load(Ordering::Relaxed)
    }

    /// Clients that the server let go, and why the first one.
    pub fn lost(&self) -> (u64, Option<String>) {
        (self.shared.lost.load(Ordering::Relaxed), self.shared.why_lost.lock().clone())
    }

    /// Latencies in microseconds since the last call.
    pub fn take_latency(&self) -> anyhow::Result<Histogram<u64>> {
        self.shared.latency.lock().take().map_or_else(new_histogram, Ok)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn note_lost(&self, why: String) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        self.why_lost.lock().get_or_insert(why);
    }
}

fn new_histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, LONGEST_US, 3)?)
}

struct Listening {
    poll: Poll,
    arrivals: mpsc::Receiver<Newcomer>,
    shared: Arc<Shared>,
    /// None: lost.
    clients: Vec<Option<Client>>,
    buffer: Vec<u8>,
    sent_at: Finder<'static>,
    latency: Histogram<u64>,
    next_heartbeat: usize,
    /// When the round of heartbeats began.
    heartbeats_since: Instant,
}

struct Client {
    stream: TcpStream,
    /// A frame that the network cut.
    rest: Vec<u8>,
    wire: Wire,
}

/// What one turn has brought.
#[derive(Default)]
struct Turn {
    deliveries: u64,
    bytes: u64,
}

impl Listening {
    fn run(&mut self) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(4096);
        while !self.shared.ends.load(Ordering::Relaxed) {
            match self.poll.poll(&mut events, Some(Duration::from_millis(50))) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                polled => polled?,
            }
            let mut turn = Turn::default();
            for event in &events {
                match event.token() {
                    WAKER => self.welcome()?,
                    Token(n) => self.hear(n, &mut turn),
                }
            }
            self.tell(turn);
            self.heartbeats();
        }
        Ok(())
    }

    fn welcome(&mut self) -> anyhow::Result<()> {
        while let Ok(newcomer) = self.arrivals.try_recv() {
            let mut stream = TcpStream::from_std(newcomer.stream);
            let token = Token(self.clients.len());
            self.poll.registry().register(&mut stream, token, Interest::READABLE)?;
            self.clients.push(Some(Client { stream, rest: newcomer.read, wire: newcomer.wire }));
        }
        Ok(())
    }

    fn hear(&mut self, n: usize, turn: &mut Turn) {
        let Some(client) = self.clients.get_mut(n).and_then(Option::as_mut) else { return };
        let lost = loop {
            match client.stream.read(&mut self.buffer) {
                Ok(0) => break Some("the server closed without a word".to_owned()),
                Ok(read) => {
                    let heard = Heard { sent_at: &self.sent_at, latency: &mut self.latency, turn };
                    if let Some(why) = client.take(&self.buffer[..read], heard) {
                        break Some(why);
                    }
                    // A short read has emptied the socket: what comes later wakes us again.
                    if read < self.buffer.len() {
                        break None;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Some(error.to_string()),
            }
        };
        if let Some(why) = lost {
            self.clients[n] = None;
            self.shared.note_lost(why);
        }
    }

    fn tell(&mut self, turn: Turn) {
        if turn.deliveries == 0 {
            return;
        }
        let mut shared = self.shared.latency.lock();
        match shared.as_mut() {
            // Both have the same bounds.
            Some(total) => {
                let _ = total.add(&self.latency);
                self.latency.reset();
            }
            None => {
                if let Ok(fresh) = new_histogram() {
                    *shared = Some(std::mem::replace(&mut self.latency, fresh));
                }
            }
        }
        drop(shared);
        self.shared.delivered_bytes.fetch_add(turn.bytes, Ordering::Relaxed);
        // Last: whoever sees the count sees the rest.
        self.shared.deliveries.fetch_add(turn.deliveries, Ordering::Release);
    }

    fn heartbeats(&mut self) {
        let passed = self.heartbeats_since.elapsed();
        let due = (self.clients.len() as f64 * (passed.as_secs_f64() / HEARTBEAT.as_secs_f64()).min(1.0)) as usize;
        while self.next_heartbeat < due {
            if let Some(client) = self.clients[self.next_heartbeat].as_mut().filter(|client| client.wire == Wire::Realtime) {
                let beat = from_client(TEXT, br#"[null,"h","phoenix","heartbeat",{}]"#);
                // A socket that takes not even this is found lost when it is read.
                let _ = client.stream.write(&beat);
            }
            self.next_heartbeat += 1;
        }
        if passed >= HEARTBEAT {
            self.next_heartbeat = 0;
            self.heartbeats_since = Instant::now();
        }
    }
}

struct Heard<'a> {
    sent_at: &'a Finder<'static>,
    latency: &'a mut Histogram<u64>,
    turn: &'a mut Turn,
}

impl Client {
    /// Some: why the server says goodbye.
    fn take(&mut self, bytes: &[u8], mut heard: Heard<'_>) -> Option<String> {
        if self.rest.is_empty() {
            let (used, goodbye) = self.frames(bytes, &mut heard);
            self.rest.extend_from_slice(&bytes[used..]);
            return goodbye;
        }
        let mut whole = std::mem::take(&mut self.rest);
        whole.extend_from_slice(bytes);
        let (used, goodbye) = self.frames(&whole, &mut heard);
        // Only what is left is kept: a crowd of emptied buffers would be large.
        self.rest = whole[used..].to_vec();
        goodbye
    }

    fn frames(&mut self, bytes: &[u8], heard: &mut Heard<'_>) -> (usize, Option<String>) {
        let now_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        let mut at = 0;
        while let Some(frame) = Frame::at(bytes, at) {
            at = frame.payload.end;
            let payload = &bytes[frame.payload];
            match frame.opcode {
                CLOSE => return (at, Some(format!("closed: {}", String::from_utf8_lossy(payload)))),
                PING => {
                    let _ = self.stream.write(&from_client(PONG, payload));
                }
                _ => {
                    let Some(mark) = heard.sent_at.find(payload) else { continue };
                    let digits = payload[mark + SENT_AT.len()..].iter().take_while(|byte| byte.is_ascii_digit());
                    let sent_us =
                        digits.fold(0_u64, |number, digit| number.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')));
                    heard.latency.saturating_record(now_us.saturating_sub(sent_us).clamp(1, LONGEST_US));
                    heard.turn.deliveries += 1;
                    heard.turn.bytes += payload.len() as u64;
                }
            }
        }
        (at, None)
    }
}
