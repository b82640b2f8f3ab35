//! Looks after every WebSocket from one task: pings in turn, silence, sockets that take nothing. No timer per connection.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use walcast_hub::CloseReason;
use walcast_protocol::websocket;

use super::{Connection, Kind};
use crate::{Core, Vital};

const TICK: Duration = Duration::from_secs(1);
/// A connection is asked for its round trip once in so many ticks.
const PING_EVERY: u64 = 30;
/// A socket that takes nothing for so long belongs to a client that does not read.
const STUCK: Duration = Duration::from_secs(20);
/// For the last words.
const GOODBYE: Duration = Duration::from_secs(2);

pub(crate) async fn run(core: Arc<Core>, cancel: CancellationToken) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for turn in 0.. {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let ping = websocket::ping(core.registry.now_us().to_be_bytes());
        let _together = core.writers.turn(Vec::new());
        core.registry.each(|connection| {
            if matches!(connection.kind, Kind::WebSocketV1 | Kind::WebSocketV2) && !look_after(&core, connection) {
                let its_turn = connection.id % PING_EVERY == turn % PING_EVERY;
                // Behind what a slow client has still to read, a ping would tell of the queue.
                if its_turn && connection.outbox.queued_bytes() == 0 {
                    connection.outbox.push(ping.clone());
                }
            }
        });
    }
}

/// True if the connection is at its end.
fn look_after(core: &Core, connection: &Connection) -> bool {
    let outbox = &connection.outbox;
    // Its task may be busy with the database.
    if outbox.blocked_for().is_some() {
        outbox.retry();
    }
    let idle = core.config.realtime.idle_timeout;
    if let Some(closed) = outbox.closed_for() {
        if closed > GOODBYE {
            outbox.abandon();
        }
    } else if connection.quiet(core.registry.now_ms()) > idle {
        core.vitals.count(Vital::ClosedIdle);
        let why = format!("idle: no heartbeat for {} s (realtime.idle_timeout)", idle.as_secs());
        outbox.close(CloseReason::Ended(why));
    } else if outbox.blocked_for().is_some_and(|blocked| blocked > STUCK) {
        let (bytes, at) = (outbox.queued_bytes(), core.progress.announced());
        outbox.close(CloseReason::Slow(format!("nothing was read for {} s, {bytes} bytes wait; now at {at}", STUCK.as_secs())));
    } else {
        return false;
    }
    true
}
