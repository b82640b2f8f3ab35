//! A TCP proxy on the loopback for fault tests: cuts connections, stalls them, slows them, refuses them, garbles answers.
//! Bytes are passed on as they come and never looked at.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Flowing,
    /// Connections stay open, nothing passes.
    Paused,
    /// Connections are closed as soon as they are made.
    Refusing,
    /// What is read waits so long before it is passed on.
    Slow(Duration),
    /// What the server says is replaced by as many bytes that mean nothing.
    Garbling,
}

#[derive(Debug, Clone, Copy)]
struct State {
    mode: Mode,
    /// Connections made before the latest cut are closed.
    cuts: u64,
}

/// What a new connection may say while it waits to be let through.
const HELD_BYTES: usize = 64 * 1024;

/// Dropping it closes every connection.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    state: watch::Sender<State>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// Leads to `port` on 127.0.0.1.
    pub async fn to(port: u16) -> anyhow::Result<Proxy> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("opening the proxy's port")?;
        let own_port = listener.local_addr()?.port();
        let (state, seen) = watch::channel(State { mode: Mode::Flowing, cuts: 0 });
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, port, seen.clone()));
            }
        });
        Ok(Proxy { port: own_port, state, accepting })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Closes the connections there are. New ones are served.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }

    /// Stops the flow both ways and keeps connections open, as a silent network does.
    pub fn pause(&self) {
        self.state.send_modify(|state| state.mode = Mode::Paused);
    }

    /// Closes the connections there are and every new one.
    pub fn refuse(&self) {
        self.state.send_modify(|state| state.mode = Mode::Refusing);
    }

    /// Everything takes longer by so much, each way.
    pub fn slow(&self, by: Duration) {
        self.state.send_modify(|state| state.mode = Mode::Slow(by));
    }

    /// From now on the server's answers are garbage.
    pub fn garble(&self) {
        self.state.send_modify(|state| state.mode = Mode::Garbling);
    }

    /// Ends every other mode. What was held back is passed on.
    pub fn resume(&self) {
        self.state.send_modify(|state| state.mode = Mode::Flowing);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The connections see the state's sender go, and end.
        self.accepting.abort();
    }
}

async fn serve(client: TcpStream, port: u16, seen: watch::Receiver<State>) {
    let mut until_closed = seen.clone();
    let born = seen.borrow().cuts;
    tokio::select! {
        () = carry(client, port, seen) => {}
        _ = until_closed.wait_for(|state| state.cuts != born || state.mode == Mode::Refusing) => {}
    }
}

async fn carry(mut client: TcpStream, port: u16, mut seen: watch::Receiver<State>) {
    let mut held = Vec::new();
    // A silent network lets no new connection through, and who gives up meanwhile never reaches the server.
    while seen.borrow_and_update().mode == Mode::Paused {
        tokio::select! {
            read = client.read_buf(&mut held), if held.len() < HELD_BYTES => {
                if !matches!(read, Ok(1..)) {
                    return;
                }
            }
            changed = seen.changed() => if changed.is_err() {
                return;
            },
        }
    }
    let Ok(mut server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return };
    if server.write_all(&held).await.is_err() {
        return;
    }
    // A test that measures should see the server's delays, not those of small packets.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(pass(from_client, to_server, seen.clone(), false), pass(from_server, to_client, seen, true));
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut seen: watch::Receiver<State>, answers: bool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let Ok(mode) = seen.wait_for(|state| state.mode != Mode::Paused).await.map(|state| state.mode) else { return };
        match mode {
            Mode::Slow(by) => tokio::time::sleep(by).await,
            Mode::Garbling if answers => buffer[..count].fill(0xFF),
            _ => {}
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
    // The end passes no sooner than the bytes before it would.
    if seen.wait_for(|state| state.mode != Mode::Paused).await.is_ok() {
        let _ = to.shutdown().await;
    }
}
