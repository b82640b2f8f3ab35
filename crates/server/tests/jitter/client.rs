//! A client on a bad line: it loses its connection again and again and comes back with the position of the last event,
//! over WebSocket (`config.walcast.after`) or as an event stream (`Last-Event-ID`). Two habits are wrong: the controls.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use walcast_testkit::{RealtimeSocket, SseStream, Vsn};

use crate::{judge::Heard, support::DEADLINE};

pub const EVERY: Duration = Duration::from_secs(15);
pub const AWAY: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(250);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Socket,
    Sse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    Honest,
    /// Comes back without its position, once.
    Forgets,
    /// Comes back with an older position, once.
    GoesBack,
}

/// What all clients of a test share.
#[derive(Default)]
pub struct World {
    pub url: String,
    /// Committed rows.
    pub written: AtomicI64,
    /// Clients that are live now.
    pub live: AtomicUsize,
    /// The server has been killed; not all are back yet.
    pub killed: AtomicBool,
    /// Whoever is cut off stays away.
    pub away: AtomicBool,
    /// Nobody is cut any more.
    pub calm: AtomicBool,
    /// The row that ends the test; 0 while it is not known.
    pub last: AtomicI64,
}

pub struct Client {
    pub world: Arc<World>,
    pub token: String,
    pub way: Way,
    pub habit: Habit,
    /// Then the line is cut for the first time, and again each `EVERY`.
    pub first_cut: Instant,
    position: Option<String>,
    older: Option<String>,
    told: Told,
}

#[derive(Default)]
pub struct Told {
    pub heard: Vec<Heard>,
    pub returns: usize,
    /// From knocking until everything that was committed before was heard.
    pub replays: Vec<Duration>,
    /// The same of the return after the kill.
    pub replays_after_kill: Vec<Duration>,
}

enum Line {
    Socket(Box<RealtimeSocket>),
    Sse(Box<SseStream>),
}

/// A return that has not yet caught up.
struct Replay {
    until: i64,
    since: Instant,
    after_kill: bool,
}

impl Client {
    pub fn new(world: &Arc<World>, token: String, way: Way, habit: Habit, first_cut: Instant) -> Client {
        let (world, told) = (world.clone(), Told::default());
        Client { world, token, way, habit, first_cut, position: None, older: None, told }
    }

    /// Ends with the last row, or when told of a resync after it.
    pub async fn run(mut self) -> Result<Told> {
        let mut cut = self.first_cut;
        let mut replay = None;
        loop {
            let entered = if self.world.away.load(Ordering::SeqCst) { None } else { self.enter().await.ok() };
            // The server is away, or lets in no more for now.
            let Some(mut line) = entered else {
                tokio::time::sleep(AGAIN).await;
                continue;
            };
            self.world.live.fetch_add(1, Ordering::SeqCst);
            let ended = self.listen(&mut line, cut, &mut replay).await;
            self.world.live.fetch_sub(1, Ordering::SeqCst);
            if ended? {
                return Ok(self.told);
            }
            drop(line);
            if cut <= Instant::now() {
                tokio::time::sleep(AWAY).await;
            }
            // Those that fell into an absence are over with it.
            while cut <= Instant::now() {
                cut += EVERY;
            }
            self.told.returns += 1;
            let (until, after_kill) = (self.world.written.load(Ordering::SeqCst), self.world.killed.load(Ordering::SeqCst));
            replay = Some(Replay { until, since: Instant::now(), after_kill });
        }
    }

    /// True if that was all; false if the line is dead.
    async fn listen(&mut self, line: &mut Line, cut: Instant, replay: &mut Option<Replay>) -> Result<bool> {
        loop {
            let calm = self.world.calm.load(Ordering::SeqCst);
            let event = tokio::select! {
                event = line.next() => event,
                () = tokio::time::sleep_until(cut.into()), if !calm => return Ok(false),
            };
            let Ok((event, position)) = event else { return Ok(false) };
            if position.is_some() {
                if self.told.heard.len().is_multiple_of(50) {
                    self.older = self.position.clone();
                }
                self.position = position;
            }
            let Some(event) = event else { continue };
            self.told.heard.push(event);
            if let Heard::Row(id) = event {
                if let Some(done) = replay.take_if(|replay| id >= replay.until) {
                    let replays = if done.after_kill { &mut self.told.replays_after_kill } else { &mut self.told.replays };
                    replays.push(done.since.elapsed());
                }
                let last = self.world.last.load(Ordering::SeqCst);
                if last > 0 && id >= last {
                    return Ok(true);
                }
            }
        }
    }

    async fn enter(&mut self) -> Result<Line> {
        let after = match self.habit {
            Habit::Forgets if self.told.returns == 2 => None,
            Habit::GoesBack if self.told.returns == 2 => self.older.clone(),
            _ => self.position.clone(),
        };
        match self.way {
            Way::Socket => {
                let mut socket = RealtimeSocket::connect(&self.world.url, &self.token, Vsn::V2).await?;
                let binding = json!({ "event": "INSERT", "schema": "public", "table": "visits" });
                let walcast = after.map_or_else(|| json!({}), |after| json!({ "after": after }));
                let config = json!({ "postgres_changes": [binding], "walcast": walcast });
                let answer = socket.join_ok("realtime:visits", config, None).await?;
                self.opened(&answer["walcast"]["status"], &answer["walcast"]["position"]);
                Ok(Line::Socket(Box::new(socket)))
            }
            Way::Sse => {
                let url = format!("{}/sse/v1/changes?table=visits&event=INSERT", self.world.url);
                let mut stream = SseStream::open(&url, Some(&self.token), after.as_deref()).await?;
                if stream.status() != 200 {
                    bail!("the stream was answered {}", stream.status());
                }
                let first = stream.next(DEADLINE).await?;
                self.opened(&json!(first.event), &json!(first.id));
                Ok(Line::Sse(Box::new(stream)))
            }
        }
    }

    fn opened(&mut self, status: &Value, position: &Value) {
        if status == "resync" {
            self.told.heard.push(Heard::Resync);
        }
        if let Some(position) = position.as_str() {
            self.position = Some(position.to_owned());
        }
    }
}

impl Line {
    /// What it says and the position that it stands for. An error is the end of the line.
    async fn next(&mut self) -> Result<(Option<Heard>, Option<String>)> {
        match self {
            Line::Socket(socket) => {
                let frame = socket.next_event(DEADLINE).await?;
                let payload = &frame.payload;
                let position = payload["position"].as_str().map(str::to_owned);
                match frame.event.as_str() {
                    "postgres_changes" => Ok((payload["data"]["record"]["id"].as_i64().map(Heard::Row), position)),
                    "system" if payload["message"].as_str().is_some_and(|text| text.starts_with("resync")) => {
                        Ok((Some(Heard::Resync), position))
                    }
                    "phx_error" | "phx_close" => bail!("the channel has ended: {payload}"),
                    _ => Ok((None, position)),
                }
            }
            Line::Sse(stream) => {
                let event = stream.next(DEADLINE).await?;
                let heard = match event.event.as_str() {
                    "change" => event.json()?["record"]["id"].as_i64().map(Heard::Row),
                    "resync" => Some(Heard::Resync),
                    _ => None,
                };
                Ok((heard, event.id))
            }
        }
    }
}
