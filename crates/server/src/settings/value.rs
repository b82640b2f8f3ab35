//! The types that a setting can have, and how text or TOML becomes one.

use std::{net::SocketAddr, time::Duration};

use walcast_engine::model::named_ttl;

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
    /// A time to live: `short`, `medium`, `long`, `very_long`, or a duration from a second to 30 days.
    Ttl,
    /// A duration up to 30 days, or one of a TTL's names; nothing is a length too.
    Span,
    /// `80%`, whole numbers of `least` to `most`.
    Percent {
        least: u8,
        most: u8,
    },
    /// A part of something: `20%`, or bytes.
    Share,
    List,
    /// A list of IP addresses and networks.
    Networks,
    /// A list of origins as browsers send them.
    Origins,
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
    Share(Share),
    List(Vec<String>),
    Address(SocketAddr),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Share {
    Percent(f64),
    Bytes(u64),
}

/// What a cache entry may live at most.
const MONTH: Duration = Duration::from_secs(30 * 24 * 3600);

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
            (Kind::Ttl, Raw::Text(text)) => {
                named_or_time(text).filter(|ttl| (Duration::from_secs(1)..=MONTH).contains(ttl)).map(Value::Time)
            }
            (Kind::Span, Raw::Text(text)) => named_or_time(text).filter(|span| *span <= MONTH).map(Value::Time),
            (Kind::Percent { least, most }, Raw::Text(text)) => {
                let within = |percent: &f64| (f64::from(*least)..=f64::from(*most)).contains(percent);
                percent(text).filter(within).map(|percent| Value::Share(Share::Percent(percent)))
            }
            (Kind::Share, Raw::Text(text)) if text.contains('%') => percent(text)
                .filter(|percent| (1.0..=99.0).contains(percent))
                .map(|percent| Value::Share(Share::Percent(percent))),
            (Kind::Share, Raw::Text(text)) => bytes(text).filter(|n| *n > 0).map(|n| Value::Share(Share::Bytes(n))),
            (Kind::Share, raw) => number(raw).filter(|n| *n > 0).map(|n| Value::Share(Share::Bytes(n))),
            (Kind::List, Raw::List(items)) => items.iter().map(|item| filled(item)).collect::<Option<_>>().map(Value::List),
            (Kind::List, Raw::Text(text)) if text.trim().is_empty() => Some(Value::List(Vec::new())),
            (Kind::List, Raw::Text(text)) => text.split(',').map(filled).collect::<Option<_>>().map(Value::List),
            (Kind::Networks, raw) => Kind::List.parse(raw).filter(|value| every(value, is_network)),
            (Kind::Origins, raw) => Kind::List.parse(raw).filter(|value| every(value, is_origin)),
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
            Kind::Ttl => "short, medium, long or very_long (30 s, 5 min, 1 h, 24 h), or a duration from 1s to 30d".into(),
            Kind::Span => "a duration of at most 30d: a number with ms, s, m, h or d".into(),
            Kind::Percent { least, most } => format!("a share from \"{least}%\" to \"{most}%\""),
            Kind::Share => "a share from \"1%\" to \"99%\", or a size with KB, MB, GB, KiB, MiB or GiB".into(),
            Kind::List => "a list, in the environment separated by commas".into(),
            Kind::Networks => "a list of IP addresses and networks such as 10.0.0.0/8".into(),
            Kind::Origins => "a list of origins such as https://app.example.com, without a path".into(),
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
            Kind::Ttl => "TTL".into(),
            Kind::Span => "duration".into(),
            Kind::Percent { .. } => "percent".into(),
            Kind::Share => "percent or bytes".into(),
            Kind::List | Kind::Networks | Kind::Origins => "list".into(),
            Kind::Address => "address".into(),
            Kind::Choice(choices) => choices.iter().map(|choice| format!("`{choice}`")).collect::<Vec<_>>().join(" or "),
            Kind::LogFilter => "log filter".into(),
        }
    }
}

fn every(value: &Value, is: fn(&str) -> bool) -> bool {
    matches!(value, Value::List(items) if items.iter().all(|item| is(item)))
}

fn is_network(text: &str) -> bool {
    text.parse::<ipnet::IpNet>().is_ok() || text.parse::<std::net::IpAddr>().is_ok()
}

fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    host.is_some_and(|host| {
        !host.is_empty() && !host.contains(['/', '?', '#', '@', '*', ' ']) && !host.contains(char::is_uppercase)
    })
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

fn named_or_time(text: &str) -> Option<Duration> {
    named_ttl(text.trim()).or_else(|| time(text))
}

fn percent(text: &str) -> Option<f64> {
    let (amount, unit) = amount_and_unit(text)?;
    (unit == "%").then(|| amount.parse().ok())?
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

/// `long`, or a time: as an entry's life may be written anywhere.
pub fn parse_ttl(text: &str) -> Option<Duration> {
    named_or_time(text)
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
    fn ttls_have_names_and_bounds() {
        let ttl = |text: &str| Kind::Ttl.parse(&Raw::Text(text.into()));
        for (text, seconds) in
            [("short", 30), ("medium", 300), ("long", 3600), ("very_long", 86_400), ("1s", 1), ("30d", 2_592_000)]
        {
            assert_eq!(ttl(text), Some(Value::Time(Duration::from_secs(seconds))), "{text}");
        }
        for bad in ["999ms", "31d", "0s", "Short", "longer", ""] {
            assert_eq!(ttl(bad), None, "{bad}");
        }
        assert_eq!(Kind::Span.parse(&Raw::Text("0s".into())), Some(Value::Time(Duration::ZERO)));
    }

    #[test]
    fn shares() {
        let share = |text: &str| Kind::Share.parse(&Raw::Text(text.into()));
        assert_eq!(share("20%"), Some(Value::Share(Share::Percent(20.0))));
        assert_eq!(share("2.5 %"), Some(Value::Share(Share::Percent(2.5))));
        assert_eq!(share("16MiB"), Some(Value::Share(Share::Bytes(16 << 20))));
        for bad in ["0%", "100%", "%", "20%%", "-5%", "0", "1.2.3%", ".%"] {
            assert_eq!(share(bad), None, "{bad}");
        }
        let jitter = |text: &str| Kind::Percent { least: 0, most: 50 }.parse(&Raw::Text(text.into()));
        assert!(jitter("0%").is_some() && jitter("50%").is_some() && jitter("51%").is_none() && jitter("0.1").is_none());
    }

    #[test]
    fn networks_and_origins() {
        let parse = |kind: Kind, text: &str| kind.parse(&Raw::Text(text.into()));
        assert!(parse(Kind::Networks, "10.0.0.0/8, 1.2.3.4,2001:db8::/32,::1").is_some() && parse(Kind::Networks, "").is_some());
        for bad in ["10.0.0.0/33", "proxy", "1.2.3.4,"] {
            assert!(parse(Kind::Networks, bad).is_none(), "{bad}");
        }
        assert!(parse(Kind::Origins, "https://app.example.com,http://localhost:5173").is_some());
        for bad in ["*", "app.example.com", "https://app.example.com/", "https://*.example.com", "https://App.example.com"] {
            assert!(parse(Kind::Origins, bad).is_none(), "{bad}");
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
