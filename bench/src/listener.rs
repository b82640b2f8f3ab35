//! A subscriber of an event stream that counts and does nothing else, so that it takes little of the machine it shares
//! with what is measured. It comes back with its last id when it is closed, as a browser does.

use std::time::Instant;

use anyhow::{Context, bail};
use futures_util::StreamExt;
use reqwest::header::{ACCEPT, AUTHORIZATION};

#[derive(Debug, Clone)]
pub struct Wish {
    pub url: String,
    pub token: String,
    /// Position to continue after.
    pub cursor: String,
    /// Ends when so many changes came.
    pub changes: u64,
}

#[derive(Debug, Clone, Copy)]
pub struct Heard {
    pub last_at: Instant,
    pub reconnects: u32,
}

pub async fn listen(http: reqwest::Client, wish: Wish) -> anyhow::Result<Heard> {
    let mut lines = Lines { last_id: wish.cursor.clone(), ..Lines::default() };
    let mut reconnects = 0;
    loop {
        let request = http.get(&wish.url).header(ACCEPT, "text/event-stream").header("Last-Event-ID", &lines.last_id);
        let answer = request.header(AUTHORIZATION, format!("Bearer {}", wish.token)).send().await?;
        if !answer.status().is_success() {
            bail!("{} answered {}: {}", wish.url, answer.status(), answer.text().await.unwrap_or_default());
        }
        let mut body = answer.bytes_stream();
        while let Some(chunk) = body.next().await {
            lines.push(&chunk.context("reading the event stream")?);
            if lines.resync {
                bail!(
                    "told to resync after {} of {} changes: the bench's limits are too small for this backlog",
                    lines.changes,
                    wish.changes
                );
            }
            if lines.changes >= wish.changes {
                return Ok(Heard { last_at: Instant::now(), reconnects });
            }
        }
        lines.rest.clear();
        reconnects += 1;
    }
}

/// Reads only what it must: ids and names of events.
#[derive(Debug, Default)]
struct Lines {
    /// A line that the network cut.
    rest: Vec<u8>,
    last_id: String,
    changes: u64,
    resync: bool,
}

impl Lines {
    fn push(&mut self, mut chunk: &[u8]) {
        while let Some(end) = chunk.iter().position(|byte| *byte == b'\n') {
            let (line, after) = (&chunk[..end], &chunk[end + 1..]);
            if self.rest.is_empty() {
                self.line(line);
            } else {
                let mut whole = std::mem::take(&mut self.rest);
                whole.extend_from_slice(line);
                self.line(&whole);
            }
            chunk = after;
        }
        self.rest.extend_from_slice(chunk);
    }

    fn line(&mut self, line: &[u8]) {
        if let Some(id) = line.strip_prefix(b"id: ") {
            self.last_id.clear();
            self.last_id.push_str(&String::from_utf8_lossy(id));
        } else if line == b"event: change" {
            self.changes += 1;
        } else if line == b"event: resync" {
            self.resync = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_counted_however_the_network_cuts_them() {
        let text = b"retry: 1\n\nid: e/0/1/0\nevent: live\ndata: {}\n\nid: e/0/2/0\nevent: change\ndata: event: change\n\nid: e/0/2/1\nevent: change\ndata: {}\n\n";
        for size in [1, 3, 10, text.len()] {
            let mut lines = Lines::default();
            text.chunks(size).for_each(|chunk| lines.push(chunk));
            assert_eq!((lines.changes, lines.last_id.as_str(), lines.resync), (2, "e/0/2/1", false), "chunks of {size}");
        }
    }
}
