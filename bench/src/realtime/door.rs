//! The way in: TCP from one of several loopback addresses, the WebSocket upgrade, joins. Asynchronous and unhurried;
//! nothing here is measured. What comes out is a bare socket for the crowd.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::realtime::frames::{CLOSE, Frame, TEXT, from_client};

/// One address has some 28,000 ports to call from, and limits by address should not be what is measured.
const ADDRESSES: u32 = 32;

/// A WebSocket that is being set up.
pub struct Guest {
    stream: TcpStream,
    buffer: Vec<u8>,
    last_ref: u32,
}

/// One topic with one binding.
#[derive(Debug, Clone)]
pub struct Wish {
    pub topic: String,
    pub table: &'static str,
    pub filter: Option<String>,
}

impl Guest {
    /// `n` chooses the address to call from. `path` is what is asked for, with its query.
    pub async fn enter(address: &str, path: &str, n: u32) -> anyhow::Result<Guest> {
        let socket = TcpSocket::new_v4()?;
        let from = Ipv4Addr::new(127, 0, 1, 1 + (n % ADDRESSES) as u8);
        socket.bind(SocketAddr::from((from, 0))).with_context(|| format!("calling from {from}"))?;
        let mut stream = socket.connect(address.parse()?).await.with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
             sec-websocket-version: 13\r\nsec-websocket-key: d2FsY2FzdC1iZW5jaC1rZQ==\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut guest = Guest { stream, buffer: Vec::with_capacity(1024), last_ref: 0 };
        let head = loop {
            if let Some(end) = memchr::memmem::find(&guest.buffer, b"\r\n\r\n") {
                break guest.buffer.drain(..end + 4).collect::<Vec<u8>>();
            }
            guest.more().await?;
        };
        ensure!(head.starts_with(b"HTTP/1.1 101"), "the upgrade was answered {}", String::from_utf8_lossy(&head));
        Ok(guest)
    }

    /// Live on return.
    pub async fn join(&mut self, wish: &Wish, token: &str) -> anyhow::Result<()> {
        self.last_ref += 1;
        let mut binding = json!({ "event": "INSERT", "schema": "public", "table": wish.table });
        if let Some(filter) = &wish.filter {
            binding["filter"] = json!(filter);
        }
        let config = json!({ "config": { "postgres_changes": [binding] }, "access_token": token });
        let reference = self.last_ref.to_string();
        let join = json!([reference, reference, wish.topic, "phx_join", config]).to_string();
        self.stream.write_all(&from_client(TEXT, join.as_bytes())).await?;
        loop {
            let (opcode, payload) = self.frame().await?;
            let text = String::from_utf8_lossy(&payload);
            ensure!(opcode != CLOSE, "closed while joining {}: {text}", wish.topic);
            let frame: Value = serde_json::from_slice(&payload).unwrap_or_default();
            if frame[3] == "phx_reply" && frame[1] == json!(reference) {
                ensure!(frame[4]["status"] == "ok", "joining {} was refused: {text}", wish.topic);
                return Ok(());
            }
        }
    }

    /// The bare socket, and what was read beyond the last frame.
    pub fn leave_door(self) -> anyhow::Result<(std::net::TcpStream, Vec<u8>)> {
        Ok((self.stream.into_std()?, self.buffer))
    }

    async fn frame(&mut self) -> anyhow::Result<(u8, Vec<u8>)> {
        loop {
            if let Some(Frame { opcode, payload }) = Frame::at(&self.buffer, 0) {
                let end = payload.end;
                let bytes = self.buffer[payload].to_vec();
                self.buffer.drain(..end);
                return Ok((opcode, bytes));
            }
            self.more().await?;
        }
    }

    async fn more(&mut self) -> anyhow::Result<()> {
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            bail!("the server has closed the connection: {}", String::from_utf8_lossy(&self.buffer));
        }
        Ok(())
    }
}
