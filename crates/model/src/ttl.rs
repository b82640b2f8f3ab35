//! Times to live by name, wherever a configuration or a query file states one.

use std::time::Duration;

/// The names and what they mean, for messages and pages too.
pub const NAMED_TTLS: [(&str, Duration); 4] = [
    ("short", Duration::from_secs(30)),
    ("medium", Duration::from_secs(5 * 60)),
    ("long", Duration::from_secs(3600)),
    ("very_long", Duration::from_secs(24 * 3600)),
];

pub fn named_ttl(name: &str) -> Option<Duration> {
    NAMED_TTLS.iter().find(|(known, _)| *known == name).map(|(_, ttl)| *ttl)
}
