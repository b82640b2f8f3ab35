//! Where the program's own words go: stderr, as text or JSON, at the level of the settings. The last warnings and errors are
//! kept as well, for a support file.

use std::{
    collections::VecDeque,
    fmt::{Debug, Write},
    io::IsTerminal,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{EnvFilter, Layer, layer::Context, layer::SubscriberExt, util::SubscriberInitExt};

use crate::settings::{LogFormat, LogSettings};

/// Lines that are kept, and characters of each.
const KEPT: usize = 200;
const CHARACTERS: usize = 2_000;

static RECENT: Mutex<VecDeque<Value>> = Mutex::new(VecDeque::new());

/// Once per process; later calls change nothing.
pub fn start(settings: &LogSettings) {
    let filter = EnvFilter::try_new(&settings.level).unwrap_or_else(|_| EnvFilter::new("info"));
    // The transport reports each lost connection as an error; the engine says the same with what it does about it.
    let filter = match "pgwire_replication=off".parse() {
        Ok(quiet) => filter.add_directive(quiet),
        Err(_) => filter,
    };
    // A file or a service manager's journal is not painted.
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false).with_ansi(colour);
    let registry = tracing_subscriber::registry().with(filter).with(Recent);
    let _ = match settings.format {
        LogFormat::Json => registry.with(lines.json()).try_init(),
        LogFormat::Text => registry.with(lines).try_init(),
    };
}

/// The last warnings and errors, the newest last.
pub fn recent() -> Vec<Value> {
    RECENT.lock().iter().cloned().collect()
}

struct Recent;

impl<S: Subscriber> Layer<S> for Recent {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        if level > Level::WARN {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let text: String = line.0.trim().chars().take(CHARACTERS).collect();
        let mut recent = RECENT.lock();
        if recent.len() >= KEPT {
            recent.pop_front();
        }
        recent.push_back(json!({ "at_ms": at_ms, "level": level.as_str(), "of": event.metadata().target(), "text": text }));
    }
}

/// The message and its fields, as a line of the log has them.
#[derive(Default)]
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}
