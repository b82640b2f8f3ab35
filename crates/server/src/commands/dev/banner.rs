//! What a person reads: steps while it starts, then addresses, keys, and the next thing to try. Plain lines without a terminal.

use std::path::Path;

use super::{places, websocket_url};
use crate::dev_state::DevState;

pub struct Progress {
    terminal: bool,
}

impl Progress {
    pub fn new(terminal: bool) -> Progress {
        Progress { terminal }
    }

    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    pub fn step(&self, text: &str) {
        if self.terminal {
            println!("\x1b[2m· {text}\x1b[0m");
        } else {
            println!("{text}");
        }
    }

    pub fn ready(&self, text: &str) {
        println!("{text}");
    }
}

pub fn banner(state: &DevState, dir: &Path, rate: u32, terminal: bool) -> String {
    let (bold, dim, end) = if terminal { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
    let mut text = String::new();
    let mut group = |title: &str, lines: &[(&str, String)]| {
        text.push_str(&format!("\n{bold}{title}{end}\n"));
        for (name, value) in lines {
            text.push_str(&format!("  {name:<10} {value}\n"));
        }
    };
    let url = &state.url;
    let patient = state.patient.patient_id.as_deref().unwrap_or("1");
    group(
        "Walcast is running",
        &[
            ("page", format!("{bold}{url}/demo{end}")),
            ("http", url.clone()),
            ("websocket", format!("{}/realtime/v1/websocket", websocket_url(url))),
            ("database", state.database_url.clone()),
            ("admin", state.admin_database_url.clone()),
        ],
    );
    group("Keys", &[("anon", state.anon_key.clone()), ("service", state.service_key.clone())]);
    group(
        "People",
        &[
            ("provider", format!("{} {dim}{}{end}", state.provider.name, state.provider.user_id)),
            ("", state.provider.token.clone()),
            ("patient", format!("{} {dim}{}, patient {patient}{end}", state.patient.name, state.patient.user_id)),
            ("", state.patient.token.clone()),
        ],
    );
    let writes = if rate == 0 {
        "nobody writes (--rate N)".to_owned()
    } else {
        format!("{rate} changes a second are written (--rate, --no-writer)")
    };
    group(
        "Next",
        &[
            ("watch", "walcast tail --table vital_signs".to_owned()),
            (
                "ask",
                format!(
                    "curl -i -H \"Authorization: Bearer $(walcast token --sub {})\" '{url}/query/v1/patient_dashboard?patient_id={patient}'",
                    state.provider.user_id
                ),
            ),
            ("writer", writes),
            ("end", "Ctrl-C; `walcast dev` goes on with the same data, `walcast dev --reset` begins anew".to_owned()),
        ],
    );
    for (name, path) in places(dir) {
        text.push_str(&format!("{dim}  {name:<10} {}{end}\n", path.display()));
    }
    text
}
