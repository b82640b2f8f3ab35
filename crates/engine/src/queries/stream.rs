//! Rows of any number to one client, past the cache. One task a stream; it ends with its reader, its time or the engine.
//!
//! A stream holds a connection and a snapshot, so there are at most half as many as connections, each for a bounded time,
//! and a reader who does not read is let go. Its end is said: who does not get [`Segment::End`] has not got everything.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use walcast_cache::AtLeast;
use walcast_model::{Claims, Position};
use walcast_query::RowLines;

use super::{
    QueryFailure,
    answer::{contains, not_that_fresh},
    failure,
};
use crate::{Core, Engine, freshness::Freshness};

/// Chunks that wait for the socket.
const QUEUE: usize = 2;
/// A reader who takes nothing for this long is gone.
const STALL: Duration = Duration::from_secs(30);
const WAIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub enum Segment {
    /// Whole lines.
    Rows(Bytes),
    /// There will be no more, and it is not all.
    Failed(QueryFailure),
    End,
}

pub struct QueryLines {
    /// It contains every commit up to here.
    pub position: Position,
    segments: mpsc::Receiver<Segment>,
}

impl QueryLines {
    /// None: the stream broke off.
    pub async fn next(&mut self) -> Option<Segment> {
        self.segments.recv().await
    }
}

impl Engine {
    /// What is wrong with the question, or with its first rows, is said here; later trouble is a segment.
    pub async fn query_lines(
        &self,
        name: &str,
        claims: &Claims,
        params: &HashMap<String, String>,
        freshness: Freshness,
    ) -> Result<QueryLines, QueryFailure> {
        let core = &self.core;
        let asked = core.asked(name, claims, params).await?;
        let at_least = core.at_least(freshness).await.ok_or_else(not_that_fresh)?;
        core.visible(at_least).await?;
        let permit = match timeout(WAIT, core.queries.streams.clone().acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            _ => {
                return Err(QueryFailure {
                    status: 503,
                    code: "too_many_streams",
                    message: "as many streams run as the connection budget allows".into(),
                    hint: "try again in a moment, or raise database.max_connections".into(),
                });
            }
        };
        let position = Position { epoch: core.progress.epoch(), lsn: core.progress.settled(), index: 0 };
        let mut lines = asked.queries.stream(&asked.question, claims).await.map_err(|error| failure(&error))?;
        let first = lines.next().await.map_err(|error| failure(&error))?;
        let (sender, segments) = mpsc::channel(QUEUE);
        let (cancel, limit) = (self.cancel.clone(), core.queries.stream_timeout);
        let name = name.to_owned();
        self.tasks.spawn(async move {
            let began = Instant::now();
            pump(lines, first, &sender, cancel, limit).await;
            tracing::debug!(query = name, took_ms = began.elapsed().as_millis() as u64, "a stream has ended");
            drop(permit);
        });
        Ok(QueryLines { position, segments })
    }
}

async fn pump(
    mut lines: RowLines,
    first: Option<Bytes>,
    sender: &mpsc::Sender<Segment>,
    cancel: CancellationToken,
    limit: Duration,
) {
    let until = tokio::time::Instant::now() + limit;
    let mut next = first;
    loop {
        let Some(chunk) = next else {
            if let Err(error) = lines.end().await {
                tracing::debug!(%error, "the connection of a stream is closed");
            }
            let _ = sender.send(Segment::End).await;
            return;
        };
        if !matches!(timeout(STALL, sender.send(Segment::Rows(chunk))).await, Ok(Ok(()))) {
            // Dropping the lines cancels what runs and closes the connection.
            return;
        }
        let fetched = tokio::select! {
            fetched = lines.next() => fetched.map_err(|error| failure(&error)),
            () = sender.closed() => return,
            () = cancel.cancelled() => Err(over("the server is going down", "ask again in a moment")),
            () = tokio::time::sleep_until(until) => {
                Err(over(&format!("the stream took longer than {} s", limit.as_secs()), "read faster, ask for less, or raise queries.stream_timeout"))
            }
        };
        next = match fetched {
            Ok(next) => next,
            Err(failure) => {
                let _ = timeout(STALL, sender.send(Segment::Failed(failure))).await;
                return;
            }
        };
    }
}

fn over(message: &str, hint: &str) -> QueryFailure {
    QueryFailure { status: 504, code: "stream_ended_early", message: message.to_owned(), hint: hint.to_owned() }
}

impl Core {
    /// Waits until a transaction that begins now sees what was asked for.
    async fn visible(&self, at_least: AtLeast) -> Result<(), QueryFailure> {
        if at_least == AtLeast::Any {
            return Ok(());
        }
        let seen = async {
            while !self.fence().await.is_ok_and(|fence| contains(&fence, at_least)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(WAIT, seen).await.map_err(|_| not_that_fresh())
    }
}
