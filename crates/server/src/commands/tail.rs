//! `walcast tail`: watches a running server's changes in the terminal. Reconnects by itself with the last position it
//! heard, and says loudly when changes may have been missed.

mod lines;
mod sse;

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use reqwest::{StatusCode, header};
use serde_json::{Map, Value};

use super::token::{mint, no_secret, running_dev};
use crate::{cli::TailArgs, failure::Failure, settings::Settings};
use lines::Painter;
use sse::{Events, SseEvent};

/// A reconnect makes a new one, so its life only bounds a single connection.
const TOKEN_LIFE: Duration = Duration::from_secs(3600);
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// The server says something at least every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

struct Watch {
    client: reqwest::Client,
    url: String,
    token: TokenSource,
    json: bool,
    painter: Painter,
    last_id: Option<String>,
}

enum TokenSource {
    Given(String),
    Secret(String),
}

/// Why a connection ended.
enum Ended {
    /// Try again, after at least this long if the server said so.
    Lost(String, Option<Duration>),
    Refused(Failure),
    /// Nobody reads our output any more.
    Closed,
}

pub async fn run(settings: Settings, args: TailArgs) -> Result<ExitCode, Failure> {
    let mut watch = Watch::new(settings, args)?;
    tokio::select! {
        end = watch.run() => end,
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::SUCCESS),
    }
}

impl Watch {
    fn new(settings: Settings, args: TailArgs) -> Result<Watch, Failure> {
        let secret = settings.auth.jwt_secret.as_ref().map(|secret| secret.expose().to_owned());
        // Asked for only if something is still missing: another user's state file need not trouble us.
        let dev = if secret.is_some() || (args.url.is_some() && args.token.is_some()) { None } else { running_dev()? };
        let base = match (&args.url, &dev) {
            (Some(url), _) => url.clone(),
            (None, Some(dev)) => dev.url.clone(),
            (None, None) => format!("http://{}", reachable(settings.server.listen)),
        };
        let token = match (args.token, secret, dev) {
            (Some(token), _, _) => TokenSource::Given(token),
            (_, Some(secret), _) => TokenSource::Secret(secret),
            (_, _, Some(dev)) => TokenSource::Secret(dev.jwt_secret),
            _ => return Err(no_secret()),
        };
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let client = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(|error| Failure::new("client", format!("no HTTP client can be made: {error}")))?;
        let event = args.event.map(|event| event.to_uppercase());
        let url = address(&base, &args.table, event.as_deref())?;
        Ok(Watch { client, url, token, json: args.json, painter: Painter { colour }, last_id: None })
    }

    async fn run(&mut self) -> Result<ExitCode, Failure> {
        let mut wait = FIRST_WAIT;
        loop {
            let heard = self.last_id.clone();
            let (why, at_least) = match self.connection().await {
                Ended::Refused(failure) => return Err(failure),
                Ended::Closed => return Ok(ExitCode::SUCCESS),
                Ended::Lost(why, at_least) => (why, at_least),
            };
            // Progress ends the punishment.
            wait = if heard == self.last_id { (wait * 2).min(LONGEST_WAIT) } else { FIRST_WAIT };
            let pause = wait.max(at_least.unwrap_or_default()).mul_f64(0.75 + 0.5 * rand::random::<f64>());
            eprintln!("{}", self.painter.notice(&format!("{why}; trying again in {:.1} s", pause.as_secs_f64())));
            tokio::time::sleep(pause).await;
        }
    }

    /// One connection, until it ends.
    async fn connection(&mut self) -> Ended {
        let token = match &self.token {
            TokenSource::Given(token) => token.clone(),
            TokenSource::Secret(secret) => {
                let claims = Map::from_iter([("role".to_owned(), Value::from("service_role"))]);
                match mint(secret, claims, TOKEN_LIFE) {
                    Ok(token) => token,
                    Err(failure) => return Ended::Refused(failure),
                }
            }
        };
        let mut request = self.client.get(&self.url).bearer_auth(token).header(header::ACCEPT, "text/event-stream");
        if let Some(id) = &self.last_id {
            request = request.header("Last-Event-ID", id);
        }
        let mut response = match request.send().await {
            Ok(response) if response.status().is_success() => response,
            Ok(response) => return refused(response).await,
            Err(error) => return Ended::Lost(format!("no server answers at {}{}", shown(&self.url), cause(&error)), None),
        };
        let mut events = Events::default();
        loop {
            match tokio::time::timeout(SILENCE, response.chunk()).await {
                Err(_) => return Ended::Lost(format!("nothing was heard for {} s", SILENCE.as_secs()), None),
                Ok(Err(error)) => return Ended::Lost(format!("the connection broke{}", cause(&error)), None),
                Ok(Ok(None)) => return Ended::Lost("the server closed the connection".into(), None),
                Ok(Ok(Some(bytes))) => {
                    for event in events.push(&bytes) {
                        if self.hear(&event).is_err() {
                            return Ended::Closed;
                        }
                    }
                    if events.overflowed() {
                        return Ended::Lost("the server sent an event without an end".into(), None);
                    }
                }
            }
        }
    }

    fn hear(&mut self, event: &SseEvent) -> std::io::Result<()> {
        if let Some(id) = &event.id {
            self.last_id = Some(id.clone());
        }
        let data: Value = serde_json::from_str(&event.data).unwrap_or_else(|_| Value::from(event.data.as_str()));
        match event.name.as_str() {
            "change" if self.json => writeln!(std::io::stdout(), "{data}")?,
            "change" => writeln!(std::io::stdout(), "{}", self.painter.change(&data))?,
            "resync" => {
                let reason = data.get("reason").and_then(Value::as_str).unwrap_or("no reason given");
                eprintln!("{}", self.painter.alarm(&format!("RESYNC: changes may have been missed here ({reason})")));
                if self.json {
                    writeln!(std::io::stdout(), "{}", serde_json::json!({"event": "resync", "data": data}))?;
                }
            }
            "live" => eprintln!("{}", self.painter.notice("live")),
            "resumed" => eprintln!("{}", self.painter.notice("resumed, nothing was missed")),
            "position" => {}
            other => match data.get("reason").and_then(Value::as_str) {
                Some(reason) => eprintln!("{}", self.painter.notice(&format!("{other}: {reason}"))),
                None => eprintln!("{}", self.painter.notice(&format!("{other} {data}"))),
            },
        }
        Ok(())
    }
}

fn address(base: &str, table: &str, event: Option<&str>) -> Result<String, Failure> {
    let wrong = |why: &str| {
        Failure::usage("wrong_argument", format!("--url {base:?} {why}"))
            .hint("for example: --url http://127.0.0.1:4000".to_owned())
    };
    if base.starts_with("https://") {
        return Err(wrong("asks for TLS, which `tail` does not speak: use it beside the server or through a tunnel"));
    }
    if !base.starts_with("http://") {
        return Err(wrong("does not begin with http://"));
    }
    let mut url = format!("{}/sse/v1/changes", base.trim_end_matches('/'));
    let encode = |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
    let mut separator = '?';
    for (name, value) in [("table", Some(table)), ("event", event)] {
        if let Some(value) = value {
            url.push_str(&format!("{separator}{name}={}", encode(value)));
            separator = '&';
        }
    }
    Ok(url)
}

/// A server that listens everywhere is reached here.
fn reachable(mut listen: std::net::SocketAddr) -> std::net::SocketAddr {
    if listen.ip().is_unspecified() {
        let here: std::net::IpAddr = if listen.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
        listen.set_ip(here);
    }
    listen
}

async fn refused(response: reqwest::Response) -> Ended {
    let status = response.status();
    let later =
        response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_secs);
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return Ended::Lost(format!("the server answers {status}"), later);
    }
    let problem: Value = response.json().await.unwrap_or_default();
    let text = |name: &str| problem.get(name).and_then(Value::as_str).map(lines::clean);
    let detail = text("detail").or_else(|| text("title")).unwrap_or_else(|| "no further word".into());
    let code = text("code").map(|code| format!(", code {code}")).unwrap_or_default();
    let hint = text("hint").unwrap_or_else(|| match status {
        StatusCode::UNAUTHORIZED => "is WALCAST_JWT_SECRET the same as the server's?".into(),
        _ => "is this the right --url and --table?".into(),
    });
    Ended::Refused(Failure::new("refused", format!("the server refuses ({status}{code}): {detail}")).hint(hint))
}

fn cause(error: &reqwest::Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    format!(" ({deepest})")
}

fn shown(url: &str) -> &str {
    url.split("/sse/").next().unwrap_or(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_carries_what_was_asked() {
        let url = address("http://h:1/", "audit.my log", Some("UPDATE")).unwrap();
        assert_eq!(url, "http://h:1/sse/v1/changes?table=audit%2Emy%20log&event=UPDATE");
        assert!(address("https://h", "t", None).is_err());
        assert!(address("h:1", "t", None).is_err());
        assert_eq!(reachable("0.0.0.0:5".parse().unwrap()).to_string(), "127.0.0.1:5");
    }
}
