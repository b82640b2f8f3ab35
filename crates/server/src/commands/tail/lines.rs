//! A change as one line for the eye: time, operation, table, key, what changed.
//! What came from the database never reaches the terminal raw.

use serde_json::{Map, Value};

pub struct Painter {
    pub colour: bool,
}

/// Longer values are cut; `--json` has them whole.
const LONGEST_VALUE: usize = 60;

impl Painter {
    /// `data` as in postgres_changes.
    pub fn change(&self, data: &Value) -> String {
        let text = |name: &str| data.get(name).and_then(Value::as_str).map(clean).unwrap_or_default();
        let empty = Map::new();
        let object = |name: &str| data.get(name).and_then(Value::as_object).unwrap_or(&empty);
        let (new, old) = (object("record"), object("old_record"));
        let kind = text("type");
        let colour = match kind.as_str() {
            "INSERT" => "32",
            "UPDATE" => "33",
            "DELETE" => "31",
            _ => "35",
        };
        let row = if new.is_empty() { old } else { new };
        let key = key_of(new, old);
        let named = |name: &String| row.get(name).map(|value| format!("{}={}", clean(name), shown(value)));
        let keys = key.iter().filter_map(named).collect::<Vec<_>>().join(" ");
        let changed = changed(new, old, &key).join("  ");
        format!(
            "{} {} {} {}  {}",
            self.paint("2", &time_of(&text("commit_timestamp"))),
            self.paint(colour, &format!("{kind:<6}")),
            self.paint("1", &format!("{}.{}", text("schema"), text("table"))),
            keys,
            changed
        )
        .trim_end()
        .to_owned()
    }

    pub fn notice(&self, text: &str) -> String {
        self.paint("2", &format!("-- {}", clean(text)))
    }

    pub fn alarm(&self, text: &str) -> String {
        self.paint("1;31", &format!("!! {}", clean(text)))
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// An old row that is part of the new one is its key; else a column called `id`, else the first.
fn key_of(new: &Map<String, Value>, old: &Map<String, Value>) -> Vec<String> {
    if !old.is_empty() && (new.is_empty() || old.len() < new.len()) {
        return old.keys().cloned().collect();
    }
    let name = new.keys().find(|name| *name == "id").or_else(|| new.keys().next());
    name.cloned().into_iter().collect()
}

fn changed(new: &Map<String, Value>, old: &Map<String, Value>, key: &[String]) -> Vec<String> {
    let whole_old_row = old.len() >= new.len();
    let rest = new.iter().filter(|(name, _)| !key.contains(name));
    rest.filter_map(|(name, value)| match old.get(name) {
        Some(before) if before == value => None,
        Some(before) => Some(format!("{}: {} → {}", clean(name), shown(before), shown(value))),
        None if whole_old_row && !old.is_empty() => None,
        None => Some(format!("{}={}", clean(name), shown(value))),
    })
    .collect()
}

fn shown(value: &Value) -> String {
    let text = clean(value.to_string());
    if text.chars().count() <= LONGEST_VALUE {
        text
    } else {
        format!("{}…", text.chars().take(LONGEST_VALUE).collect::<String>())
    }
}

/// `2026-01-02T03:04:05.678Z` is `03:04:05.678`.
fn time_of(timestamp: &str) -> String {
    let time = timestamp.split_once('T').map_or(timestamp, |(_, time)| time);
    let end = time.find(|c: char| !c.is_ascii_digit() && c != ':' && c != '.').unwrap_or(time.len());
    time[..end].chars().take(12).collect()
}

/// A terminal obeys control characters, and a row may hold any.
pub fn clean(text: impl AsRef<str>) -> String {
    text.as_ref().chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn line(data: Value) -> String {
        Painter { colour: false }.change(&data)
    }

    #[test]
    fn a_change_is_one_line() {
        let at = "2026-01-02T03:04:05.678Z";
        let base = |kind: &str, record: Value, old: Value| json!({"schema": "public", "table": "patients", "type": kind, "commit_timestamp": at, "record": record, "old_record": old});
        assert_eq!(
            line(base("INSERT", json!({"id": 7, "name": "Ann"}), json!({}))),
            "03:04:05.678 INSERT public.patients id=7  name=\"Ann\""
        );
        assert_eq!(
            line(base("UPDATE", json!({"id": 7, "name": "Bo", "ward": 1}), json!({"id": 7, "name": "Ann", "ward": 1}))),
            "03:04:05.678 UPDATE public.patients id=7  name: \"Ann\" → \"Bo\""
        );
        assert_eq!(
            line(base("UPDATE", json!({"nr": 7, "ward": 2}), json!({"nr": 7}))),
            "03:04:05.678 UPDATE public.patients nr=7  ward=2"
        );
        assert_eq!(line(base("DELETE", json!({}), json!({"nr": 7}))), "03:04:05.678 DELETE public.patients nr=7");
    }

    #[test]
    fn a_row_cannot_command_the_terminal() {
        let line = line(
            json!({"schema": "public", "table": "t\u{1b}[2J", "type": "INSERT", "record": {"id": "\u{9b}31m\u{7}", "\u{1b}c": "x"}}),
        );
        assert!(!line.chars().any(char::is_control), "{line:?}");
        let long = Painter { colour: false }.change(&json!({"record": {"id": 1, "text": "x".repeat(500)}}));
        assert!(long.len() < 150, "{long}");
    }
}
