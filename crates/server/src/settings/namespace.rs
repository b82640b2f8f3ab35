//! One `[cache.namespaces.NAME]`: what its keys mean together. Each value alone was checked by its type before.
//!
//! Called once per namespace when all layers are read. Never stops at the first mistake.

use std::{collections::HashMap, time::Duration};

use walcast_engine::{
    NamespaceConfig, Policy,
    config::{Context, Grant, NamespaceSettings, Right},
    model::Tag,
};

use super::{
    error::{Origin, SettingsError},
    table::{NAMESPACE, Setting},
    value::{Raw, Share, Value},
};

/// As the file has it.
#[derive(Default)]
pub struct Given(HashMap<&'static str, (Value, Origin)>);

/// Entries carry at most so many tags, and these are some of them.
const MAX_TAGS: usize = 64;
/// Differ from token to token: each would have entries of its own.
const TOKEN_ONLY: [&str; 4] = ["exp", "iat", "nbf", "jti"];

impl Given {
    pub fn take(&mut self, name: &str, key: &str, raw: Raw, origin: &Origin) -> Result<(), SettingsError> {
        let full = format!("cache.namespaces.{name}.{key}");
        let Some(setting) = NAMESPACE.iter().find(|setting| setting.key == key) else {
            // What was one right is three now, and this is the first of them.
            let nearest = match key {
                "role" | "roles" => Some("read".to_owned()),
                _ => super::error::nearest(key, NAMESPACE.iter().map(|setting| setting.key)),
            };
            return Err(SettingsError::unknown(&full, origin, nearest));
        };
        let value = setting.kind.parse(&raw).ok_or_else(|| SettingsError::wrong(&full, setting, &raw, origin))?;
        self.0.insert(setting.key, (value, origin.clone()));
        Ok(())
    }

    pub fn settings(mut self, name: &str, l1_bytes: u64, errors: &mut Vec<SettingsError>) -> NamespaceSettings {
        let mut wrong = |key: &str, origin: &Origin, why: String, hint: String| {
            let message = format!("{origin}: `cache.namespaces.{name}.{key}`: {why}");
            errors.push(SettingsError { code: "wrong_setting", message, hint: Some(hint) });
        };
        let tags = self.list("tags", |origin, texts| {
            if texts.len() > MAX_TAGS {
                let why = format!("{} tags, and an entry carries at most {MAX_TAGS}", texts.len());
                wrong("tags", origin, why, "use a wider tag, such as the table's".into());
            }
            let parsed = texts.iter().filter_map(|text| {
                let refused = |error| wrong("tags", origin, format!("{error}"), "for example: tags = [\"patients\"]".into());
                Tag::parse(text).map_err(refused).ok()
            });
            parsed.collect()
        });
        let mut granted = |right: Right| {
            self.list(right.as_str(), |origin, texts| {
                let parsed = texts.iter().filter_map(|text| {
                    let hint = format!("for example: {right} = [\"authenticated\", \"claim:app_role=nurse\"]");
                    let refused = |error| wrong(right.as_str(), origin, format!("`{text}`: {error}"), hint);
                    Grant::parse(text).map_err(refused).ok()
                });
                parsed.collect()
            })
        };
        let (read, write, invalidate) = (granted(Right::Read), granted(Right::Write), granted(Right::Invalidate));

        let per_context = self.flag("per_context");
        let claims = self.list("context", |origin, claims| {
            if !per_context {
                wrong("context", origin, "it says nothing of a shared namespace".into(), "add per_context = true".into());
            }
            for claim in claims.iter().filter(|claim| TOKEN_ONLY.contains(&claim.as_str())) {
                let why = format!("`{claim}` differs from token to token, so nobody would find his entries again");
                wrong("context", origin, why, "name claims that tell people apart, such as sub".into());
            }
            claims.to_vec()
        });
        let has_claims = !claims.is_empty();
        let context = per_context.then_some(if has_claims { Context::Claims(claims) } else { Context::AllClaims });

        let serve_invalidated = self.flag("serve_stale");
        if serve_invalidated && per_context {
            let why = "what is kept per context was read under somebody's rights, so an invalidated one is never answered";
            wrong("serve_stale", &self.origin("serve_stale"), why.into(), "leave out serve_stale, or per_context".into());
        }
        let l1_bytes = match self.0.get("share") {
            Some((Value::Share(Share::Bytes(bytes)), _)) => Some(*bytes),
            // Rounded down: shares that fit as percentages fit as bytes.
            Some((Value::Share(Share::Percent(percent)), _)) => Some((l1_bytes as f64 * percent / 100.0) as u64),
            _ => None,
        };
        let entries = NamespaceConfig {
            ttl: self.time("ttl"),
            ttl_jitter: self.percent("ttl_jitter").unwrap_or_default(),
            external: self.text("source") == "external",
            policy: match self.text("policy").as_str() {
                "lru" => Policy::Lru,
                "lfu" => Policy::Lfu,
                "fifo" => Policy::Fifo,
                _ => Policy::Adaptive,
            },
            l1_bytes,
            tags,
            grace: self.time("grace").unwrap_or_default(),
            stale_while_revalidate: self.time("stale_while_revalidate").unwrap_or_default(),
            refresh_ahead: self.percent("refresh_ahead"),
            negative_ttl: self.time("negative_ttl"),
            serve_invalidated,
        };
        NamespaceSettings { entries, context, read, write, invalidate }
    }

    /// Where it stands; the section's other lines say nothing of it.
    pub fn origin(&self, key: &str) -> Origin {
        self.0.get(key).map_or(Origin::Default, |(_, origin)| origin.clone())
    }

    fn value(&mut self, key: &'static str) -> Option<Value> {
        let default = |setting: &Setting| setting.kind.parse(&Raw::Text(setting.default.to_owned()));
        match self.0.get(key) {
            Some((value, _)) => Some(value.clone()),
            None => NAMESPACE.iter().find(|setting| setting.key == key && !setting.default.is_empty()).and_then(default),
        }
    }

    fn list<T>(&mut self, key: &'static str, parse: impl FnOnce(&Origin, &[String]) -> Vec<T>) -> Vec<T> {
        match self.0.get(key) {
            Some((Value::List(items), origin)) => parse(origin, items),
            _ => Vec::new(),
        }
    }

    fn flag(&mut self, key: &'static str) -> bool {
        self.value(key) == Some(Value::Flag(true))
    }

    fn text(&mut self, key: &'static str) -> String {
        match self.value(key) {
            Some(Value::Text(text)) => text,
            _ => String::new(),
        }
    }

    fn time(&mut self, key: &'static str) -> Option<Duration> {
        match self.value(key) {
            Some(Value::Time(time)) => Some(time),
            _ => None,
        }
    }

    fn percent(&mut self, key: &'static str) -> Option<f64> {
        match self.value(key) {
            Some(Value::Share(Share::Percent(percent))) => Some(percent / 100.0),
            _ => None,
        }
    }
}

/// Namespaces without a share live in what the shares leave: it must hold the largest value at least.
pub fn check_shares(shares: &[(String, u64, Origin)], l1_bytes: u64, max_value_bytes: u64) -> Option<SettingsError> {
    let taken: u64 = shares.iter().fold(0, |sum, (_, bytes, _)| sum.saturating_add(*bytes));
    if shares.is_empty() || taken.saturating_add(max_value_bytes) <= l1_bytes {
        return None;
    }
    let (_, _, largest) = shares.iter().max_by_key(|(_, bytes, _)| *bytes)?;
    let list = shares.iter().map(|(name, bytes, _)| format!("{name} {bytes}")).collect::<Vec<_>>().join(", ");
    Some(SettingsError {
        code: "wrong_setting",
        message: format!(
            "{largest}: the shares of all namespaces ({list}) take {taken} of the {l1_bytes} bytes of cache.l1_bytes, and namespaces \
             without a share need at least cache.max_value_bytes ({max_value_bytes}) of it"
        ),
        hint: Some("lower the shares, or raise cache.l1_bytes".into()),
    })
}
