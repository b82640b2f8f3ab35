//! `GET /admin/v1/support`: everything that somebody who helps wants to see, in one file, as of now.
//!
//! It leaves the house, so without secrets; and without people: subjects, addresses, topics and the values of filters are
//! replaced by a mark that is the same for the same within one file, unless `realtime.trace_payloads` permits them.

use std::hash::{BuildHasher, RandomState};

use axum::{Json, extract::State};
use serde_json::{Value, json};
use walcast_engine::registry::{Selection, Sort};

use super::Operator;
use crate::{http::App, log};

pub async fn get(_: Operator, State(app): State<App>) -> Json<Value> {
    app.engine.refresh_gauges();
    let engine = &app.engine;
    let fullest = Selection { sort: Sort::Outbox, limit: Selection::MOST, ..Selection::default() };
    let mut people = json!({
        "connections": engine.registry().connections_report(&fullest),
        "subscriptions": engine.registry().subscriptions_report(&fullest),
        "leaks": engine.registry().leaks_report(),
        "traces": engine.traces().reports(true),
    });
    if !app.shows_people {
        Masks::default().mask(&mut people);
    }
    let mut file = json!({
        "walcast": env!("CARGO_PKG_VERSION"),
        "people": if app.shows_people { "shown" } else { "masked" },
        "settings": app.settings.lines().collect::<Vec<_>>(),
        "health": engine.health().report,
        "realtime": engine.realtime_report(),
        "cache": engine.cache_report().await,
        "warnings": log::recent(),
        "metrics": app.metrics.render(),
    });
    if let (Value::Object(file), Value::Object(people)) = (&mut file, people) {
        file.extend(people);
    }
    Json(file)
}

/// Keyed anew for each file: a mark says nothing to who compares it with another's, or tries values.
#[derive(Default)]
struct Masks(RandomState);

impl Masks {
    fn mask(&self, value: &mut Value) {
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| self.mask(item)),
            Value::Object(map) => map.iter_mut().for_each(|(name, value)| match (name.as_str(), &mut *value) {
                ("subject" | "ip" | "topic", Value::String(text)) => *value = self.mark(text),
                // Names topics and filters.
                ("text", Value::String(text)) => *value = self.mark(text),
                // Column and operator stay: `id=eq.7` becomes `id=eq.#…`.
                ("filter", Value::String(filter)) => {
                    let (column, rest) = filter.split_once('=').unwrap_or(("", filter));
                    let (operator, operand) = rest.split_once('.').unwrap_or(("", rest));
                    *value = format!("{column}={operator}.{}", self.mark(operand).as_str().unwrap_or_default()).into();
                }
                _ => self.mask(value),
            }),
            _ => {}
        }
    }

    fn mark(&self, text: &str) -> Value {
        format!("#{:012x}", self.0.hash_one(text) & 0xFFFF_FFFF_FFFF).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p3_who_and_which_patient_are_marks_and_the_same_mark_is_the_same() {
        let mut file = json!({ "connections": [
            { "subject": "ada", "ip": "10.0.0.7", "tenant": "north", "bindings": [{ "table": "patients", "filter": "id=eq.4711" }] },
            { "subject": "ada", "topic": "realtime:patient:4711", "leak": "duplicate" }],
            "leaks": [{ "text": "2 topics listen to id=eq.4711" }] });
        Masks::default().mask(&mut file);
        let text = file.to_string();
        assert!(!text.contains("ada") && !text.contains("4711") && !text.contains("10.0.0.7"), "{text}");
        assert_eq!(file["connections"][0]["subject"], file["connections"][1]["subject"]);
        assert!(file["connections"][0]["bindings"][0]["filter"].as_str().unwrap().starts_with("id=eq.#"), "{text}");
        assert_eq!((&file["connections"][0]["tenant"], &file["connections"][1]["leak"]), (&json!("north"), &json!("duplicate")));
    }
}
