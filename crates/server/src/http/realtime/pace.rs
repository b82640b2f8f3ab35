//! Holds back what goes out to one client, where `limits.messages_out_…` say so: between its own outbox and the socket's.
//!
//! Without such a limit there is nothing in between.

use std::time::Duration;

use walcast_engine::{CloseReason, Engine, Outbox, OutboxReader};

use crate::http::limits::ConnectionPermit;

const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The outbox that everything for the client goes into.
pub fn paced(engine: &Engine, socket: Outbox, permit: &ConnectionPermit) -> Outbox {
    if permit.out_at_once() == usize::MAX {
        return socket;
    }
    let (outbox, reader) = engine.outbox();
    tokio::spawn(pass(reader, socket, permit.clone()));
    outbox
}

async fn pass(mut reader: OutboxReader, socket: Outbox, permit: ConnectionPermit) {
    let mut frames = Vec::new();
    while !socket.is_closed() {
        match reader.take(&mut frames).await {
            // There is room again for what did not fit: the connection's task hears of it by its socket.
            Ok(()) if frames.is_empty() => socket.want_room(),
            Ok(()) => {
                while !frames.is_empty() {
                    let may_go = frames.len().min(permit.out_at_once());
                    permit.pace_out(may_go).await;
                    // Waits for room: what is not taken here waits where it came from, and behind that in the ring.
                    let mut left = may_go;
                    while left > 0 && !socket.is_closed() {
                        let taken = socket.offer(&frames[..left], |_| false);
                        frames.drain(..taken);
                        left -= taken;
                        if left > 0 {
                            tokio::time::sleep(LOOK_AGAIN).await;
                        }
                    }
                    if socket.is_closed() {
                        return;
                    }
                }
            }
            Err(CloseReason::Slow(why)) => return socket.close(CloseReason::Slow(why)),
            Err(reason) => return socket.end(reason),
        }
    }
}
