//! The winning value of each key, handed out by type.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use super::{Secret, value::Value};

/// Every key of its table that has a value.
#[derive(Default)]
pub struct Resolved(pub HashMap<&'static str, Value>);

impl Resolved {
    pub fn optional_text(&mut self, key: &'static str) -> Option<String> {
        match self.0.remove(key) {
            None => None,
            Some(Value::Text(text)) => Some(text),
            other => mistyped(key, other),
        }
    }

    pub fn text(&mut self, key: &'static str) -> String {
        self.optional_text(key).unwrap_or_else(|| mistyped(key, None))
    }

    pub fn secret(&mut self, key: &'static str) -> Option<Secret> {
        self.optional_text(key).map(Secret::new)
    }

    pub fn flag(&mut self, key: &'static str) -> bool {
        match self.0.remove(key) {
            Some(Value::Flag(flag)) => flag,
            other => mistyped(key, other),
        }
    }

    pub fn number(&mut self, key: &'static str) -> u64 {
        self.optional_number(key).unwrap_or_else(|| mistyped(key, None))
    }

    pub fn optional_number(&mut self, key: &'static str) -> Option<u64> {
        match self.0.remove(key) {
            None => None,
            Some(Value::Number(number)) => Some(number),
            other => mistyped(key, other),
        }
    }

    pub fn optional_time(&mut self, key: &'static str) -> Option<Duration> {
        match self.0.remove(key) {
            None => None,
            Some(Value::Time(time)) => Some(time),
            other => mistyped(key, other),
        }
    }

    pub fn time(&mut self, key: &'static str) -> Duration {
        self.optional_time(key).unwrap_or_else(|| mistyped(key, None))
    }

    /// A list without a default is empty.
    pub fn list(&mut self, key: &'static str) -> Vec<String> {
        match self.0.remove(key) {
            None => Vec::new(),
            Some(Value::List(items)) => items,
            other => mistyped(key, other),
        }
    }

    pub fn address(&mut self, key: &'static str) -> SocketAddr {
        match self.0.remove(key) {
            Some(Value::Address(address)) => address,
            other => mistyped(key, other),
        }
    }
}

/// The table and `Settings` contradict each other, which a test would have found.
fn mistyped(key: &str, found: Option<Value>) -> ! {
    panic!(
        "the settings table gives `{key}` another type than Settings reads ({})",
        if found.is_some() { "wrong type" } else { "no default" }
    )
}
