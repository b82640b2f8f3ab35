//! A client of the realtime wire for tests: joins topics, sends events, waits for frames, in both
//! framings. It reads only when asked to, so a test can be a slow client by not asking.

mod frame;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use futures_util::{SinkExt, StreamExt};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{self, Bytes, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

pub use frame::{Frame, Vsn};

const REPLY_DEADLINE: Duration = Duration::from_secs(30);

/// The server answered the upgrade with plain HTTP. Found in the error of `connect` by `downcast_ref`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub status: u16,
    pub body: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the server refused the socket with {}: {}", self.status, self.body)
    }
}

impl std::error::Error for Refused {}

#[derive(Debug)]
pub struct RealtimeSocket {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    vsn: Vsn,
    last_ref: u64,
    /// Topic to the ref of its join.
    joins: HashMap<String, String>,
    /// Read while waiting for something else, in order.
    backlog: VecDeque<Frame>,
    closed: Option<Option<CloseFrame>>,
}

impl RealtimeSocket {
    /// `base` is the server's address, `http://127.0.0.1:4000`.
    pub async fn connect(base: &str, apikey: &str, vsn: Vsn) -> anyhow::Result<RealtimeSocket> {
        let base = base.trim_end_matches('/').replacen("http", "ws", 1);
        let key = utf8_percent_encode(apikey, NON_ALPHANUMERIC);
        RealtimeSocket::connect_to(&format!("{base}/realtime/v1/websocket?apikey={key}&vsn={}", vsn.as_str()), vsn).await
    }

    /// To exactly this `ws://` URL, for tests of the door itself.
    pub async fn connect_to(url: &str, vsn: Vsn) -> anyhow::Result<RealtimeSocket> {
        let socket = match timeout(REPLY_DEADLINE, connect_async(url)).await.context("the server did not answer the upgrade")? {
            Ok((socket, _)) => socket,
            Err(tungstenite::Error::Http(answer)) => {
                let body = answer.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default().into_owned();
                return Err(Refused { status: answer.status().as_u16(), body }.into());
            }
            Err(other) => return Err(anyhow!(other).context(format!("connecting to {url}"))),
        };
        Ok(RealtimeSocket { socket, vsn, last_ref: 0, joins: HashMap::new(), backlog: VecDeque::new(), closed: None })
    }

    /// Joins a topic (`realtime:…`) and hands over the reply's payload: `{"status", "response"}`.
    /// Whatever came before the reply is still there for `next_event`.
    pub async fn join(&mut self, topic: &str, config: Value, token: Option<&str>) -> anyhow::Result<Value> {
        let mut payload = json!({ "config": config });
        if let Some(token) = token {
            payload["access_token"] = json!(token);
        }
        let reference = self.new_ref();
        self.joins.insert(topic.to_owned(), reference.clone());
        self.write(topic, "phx_join", payload, &reference).await?;
        self.reply_to(&reference).await.with_context(|| format!("joining {topic}"))
    }

    /// As [`RealtimeSocket::join`], but anything else than `ok` is an error. Hands over the `response`.
    pub async fn join_ok(&mut self, topic: &str, config: Value, token: Option<&str>) -> anyhow::Result<Value> {
        let mut reply = self.join(topic, config, token).await?;
        if reply["status"] != "ok" {
            bail!("joining {topic} was refused: {reply}");
        }
        Ok(reply["response"].take())
    }

    pub async fn leave(&mut self, topic: &str) -> anyhow::Result<Value> {
        self.ask(topic, "phx_leave", json!({})).await
    }

    pub async fn heartbeat(&mut self) -> anyhow::Result<Value> {
        self.ask("phoenix", "heartbeat", json!({})).await
    }

    /// Sends an event and hands over its ref; waits for no reply.
    pub async fn send(&mut self, topic: &str, event: &str, payload: Value) -> anyhow::Result<String> {
        let reference = self.new_ref();
        self.write(topic, event, payload, &reference).await?;
        Ok(reference)
    }

    /// Sends an event and hands over its reply's payload.
    pub async fn ask(&mut self, topic: &str, event: &str, payload: Value) -> anyhow::Result<Value> {
        let reference = self.send(topic, event, payload).await?;
        self.reply_to(&reference).await.with_context(|| format!("sending {event} to {topic}"))
    }

    /// A broadcast as stock clients send it.
    pub async fn broadcast(&mut self, topic: &str, event: &str, payload: Value) -> anyhow::Result<String> {
        self.send(topic, "broadcast", json!({ "type": "broadcast", "event": event, "payload": payload })).await
    }

    /// Text as it stands, for tests of what a client should not send.
    pub async fn send_text(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.socket.send(Message::text(text)).await?)
    }

    pub async fn send_binary(&mut self, bytes: impl Into<Bytes>) -> anyhow::Result<()> {
        Ok(self.socket.send(Message::binary(bytes)).await?)
    }

    /// The ref under which the topic was joined last.
    pub fn join_ref(&self, topic: &str) -> Option<&str> {
        self.joins.get(topic).map(String::as_str)
    }

    /// The next frame, whatever it is. A closed socket is an error that says why it was closed.
    pub async fn next_event(&mut self, deadline: Duration) -> anyhow::Result<Frame> {
        self.next_where(|_| true, deadline).await
    }

    /// The first frame that `wanted` accepts. The others stay, in order, for later calls.
    pub async fn next_where(&mut self, mut wanted: impl FnMut(&Frame) -> bool, deadline: Duration) -> anyhow::Result<Frame> {
        if let Some(at) = self.backlog.iter().position(&mut wanted) {
            return self.backlog.remove(at).context("the backlog changed under us");
        }
        let end = Instant::now() + deadline;
        loop {
            let Ok(frame) = timeout_at(end, self.read()).await else {
                bail!("the wanted frame did not come within {deadline:?}; there came: {}", self.came());
            };
            match frame? {
                Some(frame) if wanted(&frame) => return Ok(frame),
                Some(frame) => self.backlog.push_back(frame),
                None => {
                    bail!("the socket was closed ({}) before the wanted frame; there came: {}", self.why_closed(), self.came())
                }
            }
        }
    }

    /// Takes every frame that was read while waiting for another.
    pub fn take_backlog(&mut self) -> Vec<Frame> {
        self.backlog.drain(..).collect()
    }

    /// Waits until the server closes the socket: the code and reason it gave, if it gave any.
    pub async fn until_closed(&mut self, deadline: Duration) -> anyhow::Result<Option<(u16, String)>> {
        let end = Instant::now() + deadline;
        while let Some(frame) =
            timeout_at(end, self.read()).await.with_context(|| format!("not closed within {deadline:?}"))??
        {
            self.backlog.push_back(frame);
        }
        Ok(self.closed.clone().flatten().map(|frame| (frame.code.into(), frame.reason.to_string())))
    }

    pub async fn close(mut self) -> anyhow::Result<()> {
        Ok(self.socket.close(None).await?)
    }

    /// As a process that crashes would leave it: a TCP reset in place of a goodbye.
    pub fn abort(self) -> anyhow::Result<()> {
        if let MaybeTlsStream::Plain(stream) = self.socket.get_ref() {
            stream.set_zero_linger()?;
        }
        Ok(())
    }

    async fn write(&mut self, topic: &str, event: &str, payload: Value, reference: &str) -> anyhow::Result<()> {
        let join_ref = self.joins.get(topic).cloned();
        let frame =
            Frame { join_ref, reference: Some(reference.to_owned()), topic: topic.to_owned(), event: event.to_owned(), payload };
        self.send_text(&frame.encode(self.vsn)).await
    }

    async fn reply_to(&mut self, reference: &str) -> anyhow::Result<Value> {
        let is_reply = |frame: &Frame| frame.event == "phx_reply" && frame.reference.as_deref() == Some(reference);
        Ok(self.next_where(is_reply, REPLY_DEADLINE).await?.payload)
    }

    fn new_ref(&mut self) -> String {
        self.last_ref += 1;
        self.last_ref.to_string()
    }

    /// `None` when the socket is closed. Safe to cancel: a frame is whole or not taken.
    async fn read(&mut self) -> anyhow::Result<Option<Frame>> {
        while self.closed.is_none() {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => return Frame::decode_text(&text, self.vsn).map(Some),
                Some(Ok(Message::Binary(bytes))) => return Frame::decode_binary(&bytes).map(Some),
                Some(Ok(Message::Close(frame))) => {
                    self.closed = Some(frame);
                    // Sends our half of the closing handshake, which the library has only queued.
                    let _ = self.socket.flush().await;
                }
                // Pings are answered by the library when it reads.
                Some(Ok(_)) => {}
                // A server that is killed sends no close frame.
                Some(Err(_)) | None => self.closed = Some(None),
            }
        }
        Ok(None)
    }

    fn why_closed(&self) -> String {
        match self.closed.clone().flatten() {
            Some(frame) => format!("code {}: {}", u16::from(frame.code), frame.reason),
            None => "without a reason".to_owned(),
        }
    }

    fn came(&self) -> String {
        let frames: Vec<String> = self.backlog.iter().map(|frame| frame.encode(self.vsn)).collect();
        if frames.is_empty() { "nothing else".to_owned() } else { frames.join("\n") }
    }
}
