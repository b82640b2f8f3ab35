//! The cheapest clients there are, so that the server's cost shows and not the client's: a request's bytes are written,
//! its answer is read by its length, on one kept connection. For HTTP/1.1 and for Redis.

use anyhow::{Context, bail, ensure};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

pub struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An HTTP answer; its head is kept as text for whoever asks for a header.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body_bytes: usize,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let named = |line: &&str| line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
        self.head.lines().find(named).and_then(|line| line.split_once(':')).map(|(_, value)| value.trim())
    }

    pub fn is_fresh_hit(&self) -> bool {
        self.header("cache-status").is_some_and(|status| status.starts_with("walcast; hit") && !status.contains("stale"))
    }
}

impl Wire {
    /// `address` as `127.0.0.1:4000`.
    pub async fn connect(address: &str) -> anyhow::Result<Wire> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Wire { stream, buffer: Vec::with_capacity(64 << 10) })
    }

    pub async fn http(&mut self, request: &[u8]) -> anyhow::Result<Answer> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let head_bytes = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end + 4;
            }
            self.more().await?;
        };
        let head = String::from_utf8_lossy(&self.buffer[..head_bytes]).into_owned();
        let status = head.get(9..12).and_then(|text| text.parse().ok()).context("no HTTP status")?;
        let mut answer = Answer { status, head, body_bytes: 0 };
        let has_body = request.get(..4) != Some(b"HEAD") && status != 304 && status != 204;
        let length = answer.header("content-length").and_then(|text| text.parse().ok()).filter(|_| has_body).unwrap_or(0);
        while self.buffer.len() < head_bytes + length {
            self.more().await?;
        }
        answer.body_bytes = length;
        Ok(answer)
    }

    /// Answers the bytes of a bulk string, of all of them in an array; none is 0.
    pub async fn redis(&mut self, request: &[u8]) -> anyhow::Result<usize> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let (mut at, mut open, mut bytes) = (0, 1_i64, 0);
        while open > 0 {
            let line_end = loop {
                if let Some(end) = find(&self.buffer[at..], b"\r\n") {
                    break at + end;
                }
                self.more().await?;
            };
            let line = std::str::from_utf8(&self.buffer[at..line_end])?.to_owned();
            at = line_end + 2;
            open -= 1;
            match line.split_at_checked(1) {
                Some(("$", length)) => {
                    let length: i64 = length.parse()?;
                    if let Ok(length) = usize::try_from(length) {
                        while self.buffer.len() < at + length + 2 {
                            self.more().await?;
                        }
                        at += length + 2;
                        bytes += length;
                    }
                }
                Some(("*", count)) => open += count.parse::<i64>()?,
                Some(("+" | ":", _)) => {}
                _ => bail!("redis answers {line}"),
            }
        }
        Ok(bytes)
    }

    async fn more(&mut self) -> anyhow::Result<()> {
        let read = self.stream.read_buf(&mut self.buffer).await?;
        ensure!(read > 0, "the server has closed the connection");
        Ok(())
    }
}

/// A command as a client library would send it.
pub fn redis_command(parts: &[&[u8]]) -> Vec<u8> {
    let mut command = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        command.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        command.extend_from_slice(part);
        command.extend_from_slice(b"\r\n");
    }
    command
}

/// One HTTP request; `headers` end each with CRLF.
pub fn http_request(method: &str, path: &str, token: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    let head = format!("{method} {path} HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {token}\r\n{headers}{length}\r\n");
    [head.as_bytes(), body].concat()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
