//! Who may do what in a cache namespace, and under which key: its rights, and the context that keeps callers apart.
//!
//! Called by every door before the cache is asked. Reading, writing and invalidating are rights of their own;
//! `service_role` has all three everywhere, anybody else what the config grants.

use std::fmt;

use serde_json::Value;
use walcast_model::{CacheKey, CacheKeyError, Claims};

use crate::{Core, Engine};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    Read,
    Write,
    Invalidate,
}

impl Right {
    pub const ALL: [Right; 3] = [Right::Read, Right::Write, Right::Invalidate];

    /// Its key in the config.
    pub fn as_str(self) -> &'static str {
        match self {
            Right::Read => "read",
            Right::Write => "write",
            Right::Invalidate => "invalidate",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whom the config gives a right: a role, or whoever has a claim, written `claim:app_metadata.roles=nurse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grant {
    Role(String),
    /// The claim is this text, or an array that has it. `path` as [`Claims::at`] takes it.
    Claim {
        path: String,
        value: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    #[error("a role is a name without spaces; a claim is written claim:name=value")]
    Form,
    /// In Supabase's tokens these are the user's own words.
    #[error("users write `user_metadata` themselves, so it grants nothing; use app_metadata")]
    UserMetadata,
}

impl Grant {
    pub fn parse(text: &str) -> Result<Grant, GrantError> {
        let Some(claim) = text.strip_prefix("claim:") else {
            let plain = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control() || c == '=');
            return if plain { Ok(Grant::Role(text.to_owned())) } else { Err(GrantError::Form) };
        };
        let (path, value) = claim.split_once('=').ok_or(GrantError::Form)?;
        if path.is_empty() || value.is_empty() {
            return Err(GrantError::Form);
        }
        if path.split('.').next() == Some("user_metadata") {
            return Err(GrantError::UserMetadata);
        }
        Ok(Grant::Claim { path: path.to_owned(), value: value.to_owned() })
    }

    pub fn holds(&self, claims: &Claims) -> bool {
        match self {
            Grant::Role(role) => role == claims.role(),
            Grant::Claim { path, value } => match claims.at(path) {
                Some(Value::Array(items)) => items.iter().any(|item| is(item, value)),
                Some(claim) => is(claim, value),
                None => false,
            },
        }
    }
}

fn is(claim: &Value, value: &str) -> bool {
    match claim {
        Value::String(text) => text == value,
        Value::Bool(flag) => value == if *flag { "true" } else { "false" },
        Value::Number(number) => number.to_string() == value,
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Grant::Role(role) => f.write_str(role),
            Grant::Claim { path, value } => write!(f, "claim:{path}={value}"),
        }
    }
}

/// What tells callers apart in a namespace that is kept per security context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Context {
    /// Role and all claims but the token's own times and id.
    AllClaims,
    /// Role and these.
    Claims(Vec<String>),
}

impl Context {
    fn of(&self, claims: &Claims) -> u128 {
        match self {
            Context::AllClaims => claims.fingerprint(),
            Context::Claims(paths) => claims.context(paths),
        }
    }
}

/// Why a caller gets no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    #[error("there is no namespace `{0}`, and cache.strict is on")]
    Unknown(String),
    #[error("namespace `{0}` holds what queries keep; it is read by /query/v1 alone")]
    OfQueries(String),
    #[error("role `{role}` has no right to {right} in namespace `{namespace}`")]
    NotAllowed { namespace: String, role: String, right: Right },
    #[error(transparent)]
    Key(#[from] CacheKeyError),
}

impl NamespaceError {
    /// How to mend it.
    pub fn hint(&self) -> String {
        match self {
            NamespaceError::Unknown(namespace) => format!("add [cache.namespaces.{namespace}] to walcast.toml"),
            NamespaceError::OfQueries(_) => "ask the query; a commit on the rows behind it drops what it keeps".into(),
            NamespaceError::NotAllowed { namespace, role, right } => format!(
                "use a service_role token, or list the role in walcast.toml, below [cache.namespaces.{namespace}]: {right} = [\"{role}\"]"
            ),
            NamespaceError::Key(_) => {
                "a key is one percent-encoded path segment of 1 to 512 printable characters, a namespace 1 to 64 of a-z, A-Z, 0-9, `_`, `-`, `.`".into()
            }
        }
    }
}

impl Engine {
    /// The key under which this caller's entry is kept, if he has the right. The only way from a request to a key.
    pub fn cache_key(&self, claims: &Claims, right: Right, namespace: &str, key: &str) -> Result<CacheKey, NamespaceError> {
        self.may_use_namespace(claims, right, namespace)?;
        let key = CacheKey::new(namespace, key)?;
        Ok(match self.core.context_of(namespace) {
            // Raising the tag of what was asked for drops it in every context.
            None => key,
            Some(context) => key.in_context(context.of(claims)),
        })
    }

    pub fn may_use_namespace(&self, claims: &Claims, right: Right, namespace: &str) -> Result<(), NamespaceError> {
        // As it stands in the path: an impossible name must not come back as advice.
        CacheKey::new(namespace, "any")?;
        // What queries keep was made under somebody's row security: nobody reads or writes it by key.
        if namespace.starts_with(walcast_query::NAMESPACE_PREFIX) {
            return Err(NamespaceError::OfQueries(namespace.to_owned()));
        }
        if self.core.cache.namespace(namespace).is_none() {
            return Err(NamespaceError::Unknown(namespace.to_owned()));
        }
        let granted = self.core.config.cache.namespaces.get(namespace).map_or(&[][..], |settings| settings.grants(right));
        if claims.role() == "service_role" || granted.iter().any(|grant| grant.holds(claims)) {
            return Ok(());
        }
        Err(NamespaceError::NotAllowed { namespace: namespace.to_owned(), role: claims.role().to_owned(), right })
    }
}

impl Engine {
    /// May he be told which keys are there? A key is data too, and in a context it is somebody else's.
    pub fn may_list_keys(&self, claims: &Claims, namespace: Option<&str>) -> bool {
        let shared = |name| self.core.context_of(name).is_none() && self.may_use_namespace(claims, Right::Read, name).is_ok();
        claims.role() == "service_role" || namespace.is_some_and(shared)
    }
}

impl Core {
    fn context_of(&self, namespace: &str) -> Option<&Context> {
        self.config.cache.namespaces.get(namespace)?.context.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(json: &str) -> Claims {
        Claims::verified(serde_json::from_str(json).unwrap()).unwrap()
    }

    #[test]
    fn a_grant_holds_for_a_role_a_claim_and_a_member_of_a_claims_list() {
        let nurse = claims(
            r#"{"role":"authenticated","exp":1,"app_role":"nurse","level":3,"on_duty":true,
                "app_metadata":{"permissions":["cache.write","rooms"],"deep":{"x":null}}}"#,
        );
        for (grant, holds) in [
            ("authenticated", true),
            ("nurse", false),
            ("claim:app_role=nurse", true),
            ("claim:app_role=nurs", false),
            ("claim:role=authenticated", true),
            ("claim:app_metadata.permissions=cache.write", true),
            ("claim:app_metadata.permissions=cache", false),
            ("claim:permissions=cache.write", false),
            ("claim:level=3", true),
            ("claim:on_duty=true", true),
            ("claim:app_metadata.deep.x=null", false),
            ("claim:app_metadata.deep={\"x\":null}", false),
        ] {
            let parsed = Grant::parse(grant).unwrap();
            assert_eq!((parsed.holds(&nurse), parsed.to_string().as_str()), (holds, grant), "{grant}");
        }
    }

    #[test]
    fn a_grant_that_nobody_or_everybody_could_have_is_refused() {
        for wrong in ["", "two words", "app_role=nurse", "claim:", "claim:app_role", "claim:=x", "claim:app_role="] {
            assert_eq!(Grant::parse(wrong), Err(GrantError::Form), "{wrong}");
        }
        for wrong in ["claim:user_metadata.role=admin", "claim:user_metadata=x"] {
            assert_eq!(Grant::parse(wrong), Err(GrantError::UserMetadata), "{wrong}");
        }
    }
}
