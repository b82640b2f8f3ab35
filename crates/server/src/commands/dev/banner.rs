//! What a person reads: steps while it starts, then the page, the addresses and keys, and commands to copy.
//! Plain lines without a terminal. Commands and keys stand alone on their lines, so that a triple click takes them whole,
//! and each command works as it stands from another terminal.

use std::{env, io::Write, path::Path, time::Duration};

use super::home::Home;
use crate::dev_state::DevState;

#[derive(Clone, Copy)]
pub struct Progress {
    terminal: bool,
}

impl Progress {
    pub fn new(terminal: bool) -> Progress {
        Progress { terminal }
    }

    pub fn step(&self, text: &str) {
        if self.terminal {
            say(&format!("\x1b[2m· {text}\x1b[0m\n"));
        } else {
            say(&format!("{text}\n"));
        }
    }

    pub fn ready(&self, banner: &Banner) {
        let colour = self.terminal && env::var_os("NO_COLOR").is_none();
        say(&banner.text(&Ink { colour }, &Invocation::of_this_process()));
    }
}

/// Nobody who stopped reading (`walcast dev | head`) shall end the server.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

pub struct Banner<'a> {
    pub state: &'a DevState,
    pub home: &'a Home,
    /// PostgreSQL's version.
    pub postgres: &'a str,
    pub rate: u32,
    pub took: Duration,
}

struct Ink {
    colour: bool,
}

impl Ink {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }
}

impl Banner<'_> {
    fn text(&self, ink: &Ink, walcast: &Invocation) -> String {
        let DevState { url, anon_key, service_key, provider, patient, .. } = self.state;
        let id = patient.patient_id.unwrap_or(1);
        let page = format!("{url}/demo");
        let mut lines = vec![
            String::new(),
            format!(
                "{}  {}",
                ink.bold("Walcast is running"),
                ink.dim(&format!("with PostgreSQL {}, ready after {:.1} s", self.postgres, self.took.as_secs_f64()))
            ),
            String::new(),
            format!("  Open this page:  {}", ink.paint("1;36", &page)),
            format!("  {}", ink.dim("a ward that is live, and a patient's dashboard from the cache")),
        ];
        let mut group = |title: &str, pairs: &[(String, String)]| {
            lines.extend([String::new(), ink.bold(title)]);
            lines.extend(pairs.iter().flat_map(|(what, text)| [format!("  {}", ink.dim(what)), format!("    {text}")]));
        };
        let pair = |what: &str, text: String| (what.to_owned(), text);
        group(
            "Point your code here",
            &[
                pair("URL, for supabase-js and everything else over HTTP", url.clone()),
                pair("WebSocket", format!("{}/realtime/v1/websocket", url.replacen("http", "ws", 1))),
                pair("database, as its administrator", self.state.admin_database_url.clone()),
            ],
        );
        group(
            "Keys",
            &[
                pair("anon", anon_key.clone()),
                pair("service_role: sees everything, for servers only", service_key.clone()),
                pair(&format!("provider {}, user {}", provider.name, provider.user_id), provider.token.clone()),
                pair(&format!("patient {id} {}, user {}", patient.name, patient.user_id), patient.token.clone()),
            ],
        );
        let token = format!("{walcast} token --sub {}", provider.user_id);
        let query = format!("{url}/query/v1/patient_dashboard?patient_id={id}");
        group(
            "Try in another terminal",
            &[
                pair("watch the changes", format!("{walcast} tail --table vital_signs")),
                pair(
                    "ask for a dashboard: the first time computed, then a hit, until a row of this patient changes",
                    format!("curl -si -H \"Authorization: Bearer $({token})\" '{query}' | grep -i '^cache-status'"),
                ),
                pair("a token for somebody else", format!("{walcast} token --sub UUID --expires 1h")),
            ],
        );
        let writer = match self.rate {
            0 => "Nothing is written by itself (--rate 5 would).".to_owned(),
            1 => "One change is written each second (--rate, --no-writer).".to_owned(),
            rate => format!("{rate} changes are written each second (--rate, --no-writer)."),
        };
        let (dir, log) = (self.home.dir().display(), self.home.log_file());
        lines.extend([
            String::new(),
            ink.dim(&writer),
            ink.dim(&format!("Data: {dir}   PostgreSQL's log: {}", log.display())),
            ink.dim(&format!("Ctrl-C ends everything and keeps the data; `{walcast} dev --reset` begins anew.")),
            String::new(),
        ]);
        lines.join("\n") + "\n"
    }
}

/// How this program is called from another terminal: by its name where the shell would find this very file, and with
/// the directory where that is not the usual one.
struct Invocation(String);

impl Invocation {
    fn of_this_process() -> Invocation {
        let program = match env::current_exe() {
            Ok(exe) if !on_path(&exe) => quoted(&exe.to_string_lossy()),
            _ => "walcast".to_owned(),
        };
        let place = ["WALCAST_DEV_DIR", "XDG_STATE_HOME"].into_iter().find_map(|name| {
            let value = env::var(name).ok().filter(|value| !value.is_empty())?;
            // Root's directory does not hang on the state home.
            let matters = name == "WALCAST_DEV_DIR" || !rustix::process::geteuid().is_root();
            matters.then(|| format!("{name}={} ", quoted(&absolute(&value))))
        });
        Invocation(format!("{}{program}", place.unwrap_or_default()))
    }
}

impl std::fmt::Display for Invocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Would a shell that is told `walcast` run this file?
fn on_path(exe: &Path) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let first = env::split_paths(&path).map(|dir| dir.join("walcast")).find(|file| file.is_file());
    first.and_then(|file| file.canonicalize().ok()).as_deref() == Some(exe)
}

fn absolute(path: &str) -> String {
    std::path::absolute(path).map_or_else(|_| path.to_owned(), |path| path.to_string_lossy().into_owned())
}

/// As a shell reads it back.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_would_read_otherwise_is_quoted() {
        for (text, wanted) in [("/opt/w/walcast", "/opt/w/walcast"), ("/my dir/w", "'/my dir/w'"), ("it's", r"'it'\''s'")] {
            assert_eq!(quoted(text), wanted);
        }
    }
}
