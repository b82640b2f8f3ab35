//! Looks after every WebSocket from one task: pings in turn, silence, sockets that take nothing. No timer per connection.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use walcast_engine::{CloseReason, Outbox};
use walcast_protocol::websocket;

/// A connection is asked for its round trip once in so many seconds.
const PING_EVERY: u64 = 30;
/// A socket that takes nothing for so long belongs to a client that does not read.
const STUCK: Duration = Duration::from_secs(20);
/// For the last words.
const GOODBYE: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub struct Wheel(Arc<Inner>);

struct Inner {
    began: Instant,
    idle: Duration,
    connections: Mutex<HashMap<u64, Arc<Look>>>,
    next: AtomicU64,
}

struct Look {
    outbox: Outbox,
    /// Milliseconds since the wheel began.
    heard_ms: AtomicU64,
    round_trip_us: AtomicU32,
    closed: Mutex<Option<Instant>>,
}

/// One connection on the wheel, for as long as it lives.
pub struct Spoke {
    id: u64,
    look: Arc<Look>,
    wheel: Arc<Inner>,
}

impl Wheel {
    /// Turns as long as somebody holds it.
    pub fn start(idle: Duration) -> Wheel {
        let inner = Arc::new(Inner { began: Instant::now(), idle, connections: Mutex::default(), next: AtomicU64::new(0) });
        tokio::spawn(turn(Arc::downgrade(&inner)));
        Wheel(inner)
    }

    pub fn add(&self, outbox: &Outbox) -> Spoke {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let look = Arc::new(Look {
            outbox: outbox.clone(),
            heard_ms: AtomicU64::new(self.0.now_ms()),
            round_trip_us: AtomicU32::new(0),
            closed: Mutex::new(None),
        });
        self.0.connections.lock().insert(id, look.clone());
        Spoke { id, look, wheel: self.0.clone() }
    }
}

impl Spoke {
    /// The client said something.
    pub fn heard(&self) {
        self.look.heard_ms.store(self.wheel.now_ms(), Ordering::Relaxed);
    }

    /// It answered a ping, which carries when it was sent. An answer shows that it lives, not that its program does.
    pub fn pong(&self, payload: &[u8]) {
        let Ok(sent) = payload.try_into().map(u64::from_be_bytes) else { return };
        let now = self.wheel.began.elapsed().as_micros() as u64;
        // Whoever makes up an answer only spoils his own figure.
        self.look.round_trip_us.store(now.saturating_sub(sent).min(u64::from(u32::MAX)) as u32, Ordering::Relaxed);
        metrics::histogram!("walcast_round_trip_seconds").record(now.saturating_sub(sent) as f64 / 1e6);
    }
}

impl Drop for Spoke {
    fn drop(&mut self) {
        self.wheel.connections.lock().remove(&self.id);
    }
}

impl Inner {
    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }
}

async fn turn(wheel: Weak<Inner>) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let mut second = 0;
    loop {
        ticks.tick().await;
        let Some(wheel) = wheel.upgrade() else { return };
        second += 1;
        let ping = websocket::ping((wheel.began.elapsed().as_micros() as u64).to_be_bytes());
        let connections: Vec<(u64, Arc<Look>)> = wheel.connections.lock().iter().map(|(id, look)| (*id, look.clone())).collect();
        for (id, look) in connections {
            let silent = Duration::from_millis(wheel.now_ms().saturating_sub(look.heard_ms.load(Ordering::Relaxed)));
            if look.outbox.is_closed() {
                let since = *look.closed.lock().get_or_insert_with(Instant::now);
                if since.elapsed() > GOODBYE {
                    look.outbox.abandon();
                }
            } else if silent > wheel.idle {
                look.outbox.close(CloseReason::Ended(format!("no heartbeat for {} s", wheel.idle.as_secs())));
            } else if look.outbox.blocked_for().is_some_and(|blocked| blocked > STUCK) {
                look.outbox.close(CloseReason::Slow { queued_bytes: look.outbox.queued_bytes() });
            } else if id % PING_EVERY == second % PING_EVERY {
                look.outbox.push(ping.clone());
            }
        }
    }
}
