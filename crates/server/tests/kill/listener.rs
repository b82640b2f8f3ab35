//! A client of the event stream, as `EventSource` is one: it comes back with the id of the last event, whatever happened.
//! One that does not is the control: the judge must find it out.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::{sync::watch, task::JoinHandle};
use walcast_engine::model::Position;
use walcast_testkit::{SseEvent, SseStream, wait};

use crate::{
    DEADLINE,
    judge::{Event, Heard},
};

/// The key of the row that ends the test.
pub const LAST: i64 = -1;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Habit {
    Honest,
    /// Comes back once without `Last-Event-ID`, at its second return.
    Forgets,
    /// Comes back once with an older id, at its second return.
    Repeats,
}

pub struct Listener {
    count: watch::Receiver<usize>,
    task: JoinHandle<Result<Told>>,
}

pub struct Told {
    pub heard: Vec<Heard>,
    pub returns: usize,
}

impl Listener {
    /// On return it is live.
    pub async fn start(url: String, token: String, habit: Habit) -> Result<Listener> {
        let (tell, count) = watch::channel(0);
        let mut first = SseStream::open(&url, Some(&token), None).await?;
        let opening = first.next(DEADLINE).await?;
        if opening.event != "live" {
            bail!("the first event was {opening:?}");
        }
        let mut listening = Listening { url, token, habit, last_id: opening.id, heard: Vec::new(), returns: 0 };
        let task = tokio::spawn(async move {
            listening.run(first, tell).await?;
            Ok(Told { heard: listening.heard, returns: listening.returns })
        });
        Ok(Listener { count, task })
    }

    /// Until it has heard something that it had not when this was called.
    pub async fn wait_more(&mut self) -> Result<()> {
        let now = *self.count.borrow();
        let count = &self.count;
        wait::until(DEADLINE, "the listener hears more", async || *count.borrow() > now || self.task.is_finished()).await
    }

    pub async fn told(self) -> Result<Told> {
        self.task.await?
    }
}

struct Listening {
    url: String,
    token: String,
    habit: Habit,
    last_id: Option<String>,
    heard: Vec<Heard>,
    returns: usize,
}

impl Listening {
    async fn run(&mut self, mut stream: SseStream, tell: watch::Sender<usize>) -> Result<()> {
        loop {
            // Quiet streams say their position, so only a broken one is silent for so long.
            while let Ok(event) = stream.next(DEADLINE).await {
                if event.event == "change" && self.change(&event)? {
                    return Ok(());
                }
                if event.event == "resync" {
                    bail!("told to resync after {:?}: {}", self.last_id, event.data);
                }
                if event.id.is_some() {
                    self.last_id = event.id;
                }
                tell.send_replace(self.heard.len());
            }
            stream = self.come_back().await;
        }
    }

    /// True for the last of all.
    fn change(&mut self, event: &SseEvent) -> Result<bool> {
        let data = event.json()?;
        let operation = data["type"].as_str().unwrap_or_default().to_owned();
        let row = if operation == "DELETE" { &data["old_record"] } else { &data["record"] };
        let (Some(key), Some(id)) = (row["id"].as_i64(), event.id.as_deref()) else {
            bail!("an event without key or id: {event:?}")
        };
        let table = data["table"].as_str().unwrap_or_default().to_owned();
        let position: Position = id.parse()?;
        self.heard.push(Heard { event: Event { operation, table, key, value: row["value"].as_i64() }, position });
        Ok(key == LAST)
    }

    async fn come_back(&mut self) -> SseStream {
        self.returns += 1;
        let last_id = match self.habit {
            Habit::Forgets if self.returns == 2 => None,
            Habit::Repeats if self.returns == 2 => self.heard.iter().rev().nth(100).map(|heard| heard.position.to_string()),
            _ => self.last_id.clone(),
        };
        loop {
            match SseStream::open(&self.url, Some(&self.token), last_id.as_deref()).await {
                Ok(stream) if stream.status() == 200 => return stream,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}
