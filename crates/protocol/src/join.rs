//! The payload of `phx_join`, read leniently as upstream does: a malformed part counts as absent.

use serde_json::{Map, Value};

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Join {
    /// In the client's order; the reply must echo it.
    pub bindings: Vec<RawBinding>,
    pub access_token: Option<String>,
    pub private: bool,
    /// `config.walcast.after`: our own clients continue from there, and only they get positions on events.
    pub after: Option<String>,
    pub tracks_position: bool,
    /// `config.walcast.component`: what of the application joins.
    pub component: Option<String>,
}

/// One `postgres_changes` binding as the client wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct RawBinding {
    pub event: String,
    pub schema: Option<String>,
    pub table: Option<String>,
    pub filter: Option<String>,
    pub select: Option<Vec<String>>,
    /// What the reply echoes.
    pub echo: Map<String, Value>,
}

impl Join {
    pub fn parse(payload: &Value) -> Join {
        let config = &payload["config"];
        let bindings = config["postgres_changes"].as_array().map(|list| list.iter().filter_map(RawBinding::parse).collect());
        let token = ["access_token", "user_token"].iter().find_map(|name| payload[*name].as_str());
        let walcast = config.get("walcast").and_then(Value::as_object);
        Join {
            bindings: bindings.unwrap_or_default(),
            access_token: token.map(str::to_owned),
            private: truthy(&config["private"]),
            after: walcast.and_then(|w| w.get("after")).and_then(Value::as_str).map(str::to_owned),
            tracks_position: walcast.is_some(),
            component: walcast.and_then(|w| w.get("component")).and_then(Value::as_str).map(str::to_owned),
        }
    }
}

impl RawBinding {
    fn parse(value: &Value) -> Option<RawBinding> {
        let echo = value.as_object()?.clone();
        let text = |name: &str| value[name].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let select = value["select"].as_array().map(|list| list.iter().filter_map(Value::as_str).map(str::to_owned).collect());
        Some(RawBinding {
            event: text("event").unwrap_or_else(|| "*".into()),
            schema: text("schema"),
            table: text("table"),
            filter: text("filter"),
            select,
            echo,
        })
    }

    /// Equal parameters share an id. It stays within 31 bits: clients keep it as a number.
    pub fn id(&self) -> u32 {
        let text = Value::Object(self.echo.clone()).to_string();
        // FNV-1a: short, stable over restarts, and nothing depends on its strength.
        let hash = text.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        (hash & 0x7FFF_FFFF).max(1)
    }
}

/// Booleans may arrive as strings.
fn truthy(value: &Value) -> bool {
    value.as_bool().unwrap_or_else(|| value.as_str() == Some("true"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bindings_keep_their_order_and_their_words() {
        let join = Join::parse(&json!({"config": {"private": "true", "postgres_changes": [
            {"event": "*", "schema": "public", "table": "todos", "filter": "id=eq.1"}, {"event": "INSERT", "schema": "public"}, 7]},
            "access_token": "t"}));
        assert_eq!(join.bindings.len(), 2);
        assert!(join.private && !join.tracks_position);
        assert_eq!(join.bindings[0].filter.as_deref(), Some("id=eq.1"));
        assert_eq!(join.bindings[1].table, None);
        assert_ne!(join.bindings[0].id(), join.bindings[1].id());
        assert_eq!(join.access_token.as_deref(), Some("t"));
    }

    #[test]
    fn a_malformed_join_is_an_empty_one() {
        for payload in [json!(null), json!([]), json!({"config": 7}), json!({"config": {"postgres_changes": {}}})] {
            assert_eq!(Join::parse(&payload), Join::default());
        }
    }
}
