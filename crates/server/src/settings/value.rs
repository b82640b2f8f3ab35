//! The types that a setting can have, and how text or TOML becomes one.

use std::{net::SocketAddr, time::Duration};

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    Text,
    /// Lower-case letters, digits and `_`, as PostgreSQL allows for a slot.
    SlotName,
    Url,
    Flag,
    Number {
        least: u64,
        most: u64,
    },
    Bytes {
        least: u64,
    },
    Time {
        least_ms: u64,
    },
    List,
    Address,
    Choice(&'static [&'static str]),
    LogFilter,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Text(String),
    Flag(bool),
    Number(u64),
    Time(Duration),
    List(Vec<String>),
    Address(SocketAddr),
}

/// A value as it was found, before anyone knows what it should be.
#[derive(Debug, Clone, PartialEq)]
pub enum Raw {
    /// From the environment, a flag, or a TOML string.
    Text(String),
    Number(i64),
    Flag(bool),
    List(Vec<String>),
    /// A TOML value that no setting can be.
    Other(String),
}

impl Raw {
    pub fn shown(&self) -> String {
        match self {
            Raw::Text(text) => format!("{:?}", text.chars().take(80).collect::<String>()),
            Raw::Number(number) => number.to_string(),
            Raw::Flag(flag) => flag.to_string(),
            Raw::List(items) => format!("{items:?}"),
            Raw::Other(what) => what.clone(),
        }
    }
}

impl Kind {
    /// None: this is not such a value.
    pub fn parse(&self, raw: &Raw) -> Option<Value> {
        match (self, raw) {
            (Kind::Text, Raw::Text(text)) => filled(text).map(Value::Text),
            (Kind::SlotName, Raw::Text(text)) => {
                let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
                filled(text).filter(|text| text.len() <= 63 && text.bytes().all(plain)).map(Value::Text)
            }
            (Kind::Url, Raw::Text(text)) => {
                let known = ["postgresql://", "postgres://"].iter().any(|scheme| text.starts_with(scheme));
                known.then(|| Value::Text(text.clone()))
            }
            (Kind::Flag, Raw::Flag(flag)) => Some(Value::Flag(*flag)),
            (Kind::Flag, Raw::Text(text)) => match text.as_str() {
                "true" | "on" | "yes" | "1" => Some(Value::Flag(true)),
                "false" | "off" | "no" | "0" => Some(Value::Flag(false)),
                _ => None,
            },
            (Kind::Number { least, most }, raw) => number(raw).filter(|n| (least..=most).contains(&n)).map(Value::Number),
            (Kind::Bytes { least }, Raw::Text(text)) => bytes(text).filter(|n| n >= least).map(Value::Number),
            (Kind::Bytes { least }, raw) => number(raw).filter(|n| n >= least).map(Value::Number),
            (Kind::Time { least_ms }, Raw::Text(text)) => {
                time(text).filter(|time| *time >= Duration::from_millis(*least_ms)).map(Value::Time)
            }
            (Kind::List, Raw::List(items)) => items.iter().map(|item| filled(item)).collect::<Option<_>>().map(Value::List),
            (Kind::List, Raw::Text(text)) if text.trim().is_empty() => Some(Value::List(Vec::new())),
            (Kind::List, Raw::Text(text)) => text.split(',').map(filled).collect::<Option<_>>().map(Value::List),
            (Kind::Address, Raw::Text(text)) => text.parse().ok().map(Value::Address),
            (Kind::Choice(choices), Raw::Text(text)) => choices.contains(&text.as_str()).then(|| Value::Text(text.clone())),
            (Kind::LogFilter, Raw::Text(text)) => {
                let valid = !text.trim().is_empty() && tracing_subscriber::EnvFilter::try_new(text).is_ok();
                valid.then(|| Value::Text(text.clone()))
            }
            _ => None,
        }
    }

    pub fn expected(&self) -> String {
        match self {
            Kind::Text => "text".into(),
            Kind::SlotName => "at most 63 of the characters a-z, 0-9 and `_`".into(),
            Kind::Url => "a URL that begins with postgresql://".into(),
            Kind::Flag => "true or false".into(),
            Kind::Number { least, most } => format!("a whole number from {least} to {most}"),
            Kind::Bytes { .. } => "a size: a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB".into(),
            Kind::Time { .. } => "a duration: a number with ms, s, m, h or d".into(),
            Kind::List => "a list, in the environment separated by commas".into(),
            Kind::Address => "an IP address and a port".into(),
            Kind::Choice(choices) => format!("one of {}", choices.join(", ")),
            Kind::LogFilter => "a level (error, warn, info, debug, trace) or a list of module=level".into(),
        }
    }

    /// The type's name on the reference page.
    pub fn name(&self) -> String {
        match self {
            Kind::Text | Kind::SlotName => "text".into(),
            Kind::Url => "URL".into(),
            Kind::Flag => "true or false".into(),
            Kind::Number { .. } => "number".into(),
            Kind::Bytes { .. } => "bytes".into(),
            Kind::Time { .. } => "duration".into(),
            Kind::List => "list".into(),
            Kind::Address => "address".into(),
            Kind::Choice(choices) => choices.iter().map(|choice| format!("`{choice}`")).collect::<Vec<_>>().join(" or "),
            Kind::LogFilter => "log filter".into(),
        }
    }
}

fn filled(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn number(raw: &Raw) -> Option<u64> {
    match raw {
        Raw::Number(number) => u64::try_from(*number).ok(),
        Raw::Text(text) => text.trim().replace('_', "").parse().ok(),
        _ => None,
    }
}

/// `64MiB`, `1.5 GB`, `4096`.
fn bytes(text: &str) -> Option<u64> {
    let (amount, unit) = amount_and_unit(text)?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return None,
    };
    scaled(amount, factor)
}

/// `250ms`, `60s`, `1.5h`. A bare number could be anything, so it is nothing.
fn time(text: &str) -> Option<Duration> {
    let (amount, unit) = amount_and_unit(text)?;
    let factor: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    scaled(amount, factor).map(Duration::from_millis)
}

fn amount_and_unit(text: &str) -> Option<(&str, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (amount, unit) = text.split_at(end);
    (!amount.is_empty()).then(|| (amount, unit.trim()))
}

fn scaled(amount: &str, factor: u64) -> Option<u64> {
    match amount.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor),
        Err(_) => {
            let exact = amount.parse::<f64>().ok()? * factor as f64;
            (exact < 9e15).then_some(exact.round() as u64)
        }
    }
}

/// `90m` as one would write it; used by tokens too.
pub fn parse_time(text: &str) -> Option<Duration> {
    time(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, expected) in
            [("64MiB", 64 << 20), ("1GB", 1_000_000_000), ("4096", 4096), ("1.5 KiB", 1536), ("5mb", 5_000_000)]
        {
            assert_eq!(bytes(text), Some(expected), "{text}");
        }
        for bad in ["", "MiB", "-1", "1TBx", "1..2MB", "99999999999999999999", "99999999999GiB", "٣MB"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [("60s", 60_000), ("5m", 300_000), ("250ms", 250), ("1.5h", 5_400_000), ("1 d", 86_400_000)] {
            assert_eq!(time(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["60", "", "s", "-1s", "1y", "1M", "1e3s"] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }
}
