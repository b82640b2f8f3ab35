//! What is wrong with the settings, where it stands, and what was probably meant.

use std::fmt;

use super::{table::Setting, value::Raw};

/// Where a value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    File { path: String, line: usize },
    Env(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{path} line {line}"),
            Origin::Env(name) => write!(f, "environment variable {name}"),
            Origin::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SettingsError {
    pub code: &'static str,
    pub message: String,
    pub hint: Option<String>,
}

/// All of them at once, so that one round mends the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsErrors(pub Vec<SettingsError>);

impl SettingsError {
    pub fn unknown(what: &str, origin: &Origin, nearest: Option<String>) -> SettingsError {
        let hint = nearest
            .map_or_else(|| "`walcast config --reference` lists all settings".into(), |name| format!("did you mean `{name}`?"));
        SettingsError { code: "unknown_setting", message: format!("{origin}: there is no setting `{what}`"), hint: Some(hint) }
    }

    pub fn wrong(key: &str, setting: &Setting, raw: &Raw, origin: &Origin) -> SettingsError {
        let shown = if setting.secret { "a value (not shown)".to_owned() } else { raw.shown() };
        SettingsError {
            code: "wrong_setting",
            message: format!("{origin}: `{key}` is {shown}, but must be {}", setting.kind.expected()),
            hint: Some(format!("for example: {key} = {}", setting.example)),
        }
    }

    pub fn unreadable(path: &str, what: &str, reason: impl fmt::Display, hint: Option<&str>) -> SettingsError {
        SettingsError {
            code: "unreadable_file",
            message: format!("{what} {path} cannot be read: {reason}"),
            hint: hint.map(str::to_owned),
        }
    }
}

/// The candidate that was probably meant, if any is near enough.
pub fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let near = |name: &'a str| (strsim::jaro_winkler(wanted, name), name);
    let best = candidates.into_iter().map(near).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.75).then(|| best.1.to_owned())
}
