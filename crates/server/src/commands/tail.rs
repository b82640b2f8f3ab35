//! `walcast tail`: watches a running server's changes in the terminal. Reconnects by itself with the last position it
//! heard, and says loudly when changes may have been missed.

pub mod lines;
mod sse;

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use reqwest::{StatusCode, header};
use serde_json::Value;

use super::reach::{Reach, cause, refused};
use crate::{cli::TailArgs, failure::Failure, settings::Settings};
use lines::Painter;
use sse::{Events, SseEvent};

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// The server says something at least every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

struct Watch {
    reach: Reach,
    url: String,
    json: bool,
    painter: Painter,
    last_id: Option<String>,
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
        let reach = Reach::new(&settings, args.url.as_deref(), args.token.as_deref())?;
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let event = args.event.map(|event| event.to_uppercase());
        let url = address(&reach.base, &args.table, event.as_deref());
        Ok(Watch { reach, url, json: args.json, painter: Painter { colour }, last_id: None })
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
        let token = match self.reach.token() {
            Ok(token) => token,
            Err(failure) => return Ended::Refused(failure),
        };
        let mut request = self.reach.client.get(&self.url).bearer_auth(token).header(header::ACCEPT, "text/event-stream");
        if let Some(id) = &self.last_id {
            request = request.header("Last-Event-ID", id);
        }
        let mut response = match request.send().await {
            Ok(response) if response.status().is_success() => response,
            Ok(response) => return ended(response).await,
            Err(error) => return Ended::Lost(format!("no server answers at {}{}", self.reach.base, cause(&error)), None),
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

fn address(base: &str, table: &str, event: Option<&str>) -> String {
    let mut url = format!("{base}/sse/v1/changes");
    let encode = |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
    let mut separator = '?';
    for (name, value) in [("table", Some(table)), ("event", event)] {
        if let Some(value) = value {
            url.push_str(&format!("{separator}{name}={}", encode(value)));
            separator = '&';
        }
    }
    url
}

async fn ended(response: reqwest::Response) -> Ended {
    let status = response.status();
    let later =
        response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_secs);
    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        return Ended::Lost(format!("the server answers {status}"), later);
    }
    Ended::Refused(refused(response, "is this the right --url and --table?").await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_carries_what_was_asked() {
        let url = address("http://h:1", "audit.my log", Some("UPDATE"));
        assert_eq!(url, "http://h:1/sse/v1/changes?table=audit%2Emy%20log&event=UPDATE");
    }
}
