//! Outboxes that are written straight into sockets, with real sockets: order, half-written frames, full sockets, the end.

use std::sync::Arc;

use bytes::Bytes;
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
};
use walcast_hub::{Attention, CloseReason, Outbox, OutboxLimits, SocketEnd, Writers};

const LIMITS: OutboxLimits = OutboxLimits { bytes: 64 << 10, frames: 1_000 };

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), server.unwrap().0)
}

fn writers() -> Writers {
    Writers::start(2, Arc::new(|_| {})).unwrap()
}

fn goodbye(reason: &CloseReason) -> Option<Bytes> {
    match reason {
        CloseReason::Ended(text) => Some(Bytes::from(format!("<{text}>"))),
        CloseReason::Slow(_) => Some(Bytes::from_static(b"<slow>")),
        CloseReason::Gone => None,
    }
}

/// What a connection's task does; `room` is called when there is room again. Returns the reason of the end.
async fn tend(end: SocketEnd, mut room: impl FnMut()) -> Option<CloseReason> {
    let mut full = false;
    loop {
        tokio::select! {
            _ = end.socket.writable(), if full => {
                full = false;
                end.retry();
            }
            attention = end.attention(full) => match attention {
                Attention::Blocked => full = true,
                Attention::Room => room(),
                Attention::Finished => return end.close_reason(),
            }
        }
    }
}

/// The n-th of the frames, whose lengths differ so that sockets fill up in the middle of one.
fn frame(n: usize) -> Bytes {
    Bytes::from(format!("[{n}:{}]", "x".repeat(n * 7_919 % 30_000)))
}

fn give(outbox: &Outbox, next: &mut usize, end: usize) {
    while *next < end && outbox.offer(&[frame(*next)], |_| false) == 1 {
        *next += 1;
    }
    if *next == end {
        outbox.end(CloseReason::Ended("the end".into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_a_socket_that_is_full_again_and_again_gets_every_byte_in_order_and_then_the_last_words() {
    const FRAMES: usize = 1_500;
    let (mut client, server) = pair().await;
    let writers = writers();
    let (outbox, end) = writers.outbox(LIMITS, server, goodbye);
    let mut next = 0;
    give(&outbox, &mut next, FRAMES);
    let giver = outbox.clone();
    let tending = tokio::spawn(tend(end, move || give(&giver, &mut next, FRAMES)));
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).await.unwrap();
    let mut expected: Vec<u8> = (0..FRAMES).flat_map(frame).collect();
    expected.extend_from_slice(b"<the end>");
    assert_eq!(heard.len(), expected.len());
    assert!(heard == expected, "bytes came in another order");
    assert_eq!(tending.await.unwrap(), Some(CloseReason::Ended("the end".into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_whoever_is_closed_while_a_frame_is_half_written_gets_its_rest_and_nothing_else_but_why() {
    let (mut client, server) = pair().await;
    let writers = writers();
    let (outbox, end) = writers.outbox(LIMITS, server, goodbye);
    // Until the socket is full, and the outbox behind it.
    let mut next = 0;
    while outbox.blocked_for().is_none() || outbox.offer(&[frame(next)], |_| false) == 1 {
        next += outbox.offer(&[frame(next)], |_| false);
        tokio::task::yield_now().await;
    }
    outbox.close(CloseReason::Slow("it does not read".into()));
    let tending = tokio::spawn(tend(end, || {}));
    let mut heard = Vec::new();
    client.read_to_end(&mut heard).await.unwrap();
    let heard = String::from_utf8(heard).unwrap();
    let whole = heard.strip_suffix("<slow>").expect("the reason comes last");
    assert!(whole.ends_with(']'), "a frame was cut: {}", &whole[whole.len().saturating_sub(40)..]);
    assert!(matches!(tending.await.unwrap(), Some(CloseReason::Slow(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn p9_a_client_that_has_gone_ends_its_connection() {
    let (client, server) = pair().await;
    let writers = writers();
    let (outbox, end) = writers.outbox(LIMITS, server, goodbye);
    drop(client);
    let tending = tokio::spawn(tend(end, || {}));
    while outbox.queued_bytes() > 0 || outbox.push(Bytes::from_static(b"anybody?")) {
        tokio::task::yield_now().await;
    }
    assert_eq!(tending.await.unwrap(), Some(CloseReason::Gone));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_turn_brings_reaches_every_socket() {
    let writers = writers();
    let mut clients = Vec::new();
    for _ in 0..200 {
        let (client, server) = pair().await;
        let (outbox, end) = writers.outbox(OutboxLimits { bytes: 1 << 20, ..LIMITS }, server, goodbye);
        clients.push((client, outbox, end));
    }
    let turn = writers.turn(vec![1]);
    for n in 0..10 {
        for (_, outbox, _) in &clients {
            assert_eq!(outbox.offer(&[frame(n)], |_| false), 1);
        }
    }
    drop(turn);
    let expected: Vec<u8> = (0..10).flat_map(frame).collect();
    for (client, ..) in &mut clients {
        let mut heard = vec![0; expected.len()];
        client.read_exact(&mut heard).await.unwrap();
        assert!(heard == expected);
    }
}
