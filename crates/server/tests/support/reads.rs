//! Reads and fills over HTTP, as an application's server does them.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use walcast_testkit::wait;

use super::{DEADLINE, Server};

/// Cheap to clone; all clones share connections.
#[derive(Clone)]
pub struct Reads {
    http: reqwest::Client,
    url: String,
    token: String,
}

/// An answer, with what its headers say.
#[derive(Debug, Clone)]
pub struct Seen {
    pub status: u16,
    pub body: String,
    pub cache_status: String,
    pub ticket: Option<String>,
    pub position: String,
}

impl Seen {
    pub fn is_hit(&self) -> bool {
        self.cache_status.starts_with("walcast; hit")
    }

    pub fn is_stale(&self) -> bool {
        self.is_hit() && self.cache_status.contains("; stale")
    }

    pub fn is_fresh_hit(&self) -> bool {
        self.is_hit() && !self.is_stale()
    }

    pub fn is_from_l2(&self) -> bool {
        self.is_fresh_hit() && self.cache_status.ends_with("detail=l2")
    }

    /// The ticket of a miss.
    pub fn ticket(&self) -> Result<&str> {
        self.ticket.as_deref().with_context(|| format!("no ticket in {self:?}"))
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("no JSON: {self:?}"))
    }
}

/// What makes a put good.
#[derive(Debug, Clone, Copy)]
pub enum By<'a> {
    Ticket(&'a str),
    Written(u64),
}

impl Reads {
    pub fn service(server: &Server) -> Reads {
        Reads::with_token(server, server.token("service_role", None))
    }

    pub fn with_token(server: &Server, token: String) -> Reads {
        Reads { http: reqwest::Client::new(), url: server.url.clone(), token }
    }

    /// `path` as `/cache/v1/n/k` or `/query/v1/name?param=1`.
    pub async fn get(&self, path: &str) -> Result<Seen> {
        self.ask(path, None).await
    }

    pub async fn get_at_least(&self, path: &str, at_least: &str) -> Result<Seen> {
        self.ask(path, Some(at_least)).await
    }

    async fn ask(&self, path: &str, at_least: Option<&str>) -> Result<Seen> {
        let mut request = self.http.get(format!("{}{path}", self.url)).bearer_auth(&self.token);
        if let Some(at_least) = at_least {
            request = request.header("walcast-at-least", at_least);
        }
        let answer = request.send().await?;
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(Seen {
            status: answer.status().as_u16(),
            cache_status: header("cache-status").unwrap_or_default(),
            ticket: header("walcast-ticket"),
            position: header("walcast-position").unwrap_or_default(),
            body: answer.text().await?,
        })
    }

    /// `"stored"`, or the reason why not.
    pub async fn put(&self, path: &str, by: By<'_>, tags: &str, body: &str) -> Result<String> {
        let request = self.http.put(format!("{}{path}", self.url)).bearer_auth(&self.token).header("cache-tag", tags);
        let request = match by {
            By::Ticket(ticket) => request.header("walcast-ticket", ticket),
            By::Written(xid) => request.header("walcast-written", xid.to_string()),
        };
        let answer = request.body(body.to_owned()).send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        let answer: Value = serde_json::from_str(&text).with_context(|| format!("{status}: {text}"))?;
        Ok(match (&answer["stored"], &answer["reason"], &answer["code"]) {
            (Value::Bool(true), ..) => "stored".to_owned(),
            (_, Value::String(reason), _) => reason.clone(),
            (_, _, Value::String(code)) => code.clone(),
            _ => bail!("{status}: {text}"),
        })
    }

    /// Fills a miss with a value that `read` reads after the ticket was issued.
    pub async fn fill(&self, path: &str, tags: &str, read: impl AsyncFnOnce() -> Result<String>) -> Result<String> {
        let miss = self.get(path).await?;
        let body = read().await?;
        self.put(path, By::Ticket(miss.ticket()?), tags, &body).await
    }

    /// The position from which on the entry is gone.
    pub async fn delete(&self, path: &str) -> Result<String> {
        let answer = self.http.delete(format!("{}{path}", self.url)).bearer_auth(&self.token).send().await?;
        position(answer).await
    }

    pub async fn invalidate(&self, what: Value) -> Result<String> {
        let request = self.http.post(format!("{}/cache/v1/invalidate", self.url)).bearer_auth(&self.token);
        position(request.json(&what).send().await?).await
    }

    /// Everything committed before this call has been invalidated when it returns.
    pub async fn heard(&self) -> Result<()> {
        self.invalidate(json!({ "tags": ["tests:heard"] })).await.map(drop)
    }

    /// Everything committed before this call is settled, and known to be, when it returns.
    pub async fn settled(&self) -> Result<()> {
        let place = lsn(&self.invalidate(json!({ "tags": ["tests:heard"] })).await?);
        wait::until(DEADLINE, "the stream has settled", async || {
            let Ok(answer) = self.http.get(format!("{}/readyz", self.url)).send().await else { return false };
            let report: Value = answer.json().await.unwrap_or_default();
            report["position"].as_str().is_some_and(|position| lsn(position) >= place)
        })
        .await
    }
}

/// Its LSN, for comparing places of one epoch.
fn lsn(position: &str) -> Option<u64> {
    let mut parts = position.split('/').skip(1);
    let mut half = || u64::from_str_radix(parts.next()?, 16).ok();
    Some((half()? << 32) | half()?)
}

async fn position(answer: reqwest::Response) -> Result<String> {
    let status = answer.status();
    let text = answer.text().await?;
    let value: Value = serde_json::from_str(&text).with_context(|| format!("{status}: {text}"))?;
    value["position"].as_str().map(str::to_owned).with_context(|| format!("{status}: {text}"))
}
