//! The header of a query file: one `-- key: value` a line, before the statement.
//!
//! Called by `file` for each comment line. Every mistake says what and how to mend it; nothing is guessed.

use std::time::Duration;

use walcast_model::{TableName, named_ttl};

use crate::{
    file::{Param, Wrong, nearest},
    page::PageBy,
    template::TagTemplate,
};

const KEYS: [&str; 13] = [
    "name",
    "describe",
    "param",
    "ttl",
    "namespace",
    "tags",
    "max_rows",
    "roles",
    "max_age",
    "depends",
    "page",
    "client_max_age",
    "s_maxage",
];

#[derive(Debug, Default)]
pub(crate) struct Header {
    pub name: Option<String>,
    pub describe: Option<String>,
    pub params: Vec<Param>,
    pub ttl: Option<Duration>,
    pub max_rows: Option<usize>,
    pub roles: Option<Vec<String>>,
    pub max_age: Option<Duration>,
    pub depends: Vec<TableName>,
    pub namespace: Option<String>,
    /// With their line: they may name parameters that are declared below them.
    pub tags: Vec<(usize, String)>,
    pub page: Option<(usize, PageBy)>,
    pub client_max_age: Option<Duration>,
    pub s_maxage: Option<Duration>,
}

impl Header {
    pub fn line(&mut self, line: usize, comment: &str) -> Result<(), Wrong> {
        // A comment without `key:` is only a comment.
        let Some((key, value)) = comment.split_once(':') else { return Ok(()) };
        let (key, value) = (key.trim(), value.trim());
        if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
            return Ok(());
        }
        if !KEYS.contains(&key) {
            let hint = match nearest(key, KEYS) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known are {}; an ordinary comment goes below the header", KEYS.join(", ")),
            };
            return Err((line, format!("`{key}` is not a header of a query"), hint));
        }
        if value.is_empty() {
            return Err((line, format!("`{key}` has no value"), format!("write `-- {key}: …` or delete the line")));
        }
        let twice = match key {
            "name" => self.name.is_some(),
            "ttl" => self.ttl.is_some(),
            "max_rows" => self.max_rows.is_some(),
            "roles" => self.roles.is_some(),
            "max_age" => self.max_age.is_some(),
            "describe" => self.describe.is_some(),
            "namespace" => self.namespace.is_some(),
            "page" => self.page.is_some(),
            "client_max_age" => self.client_max_age.is_some(),
            "s_maxage" => self.s_maxage.is_some(),
            _ => false,
        };
        if twice {
            return Err((line, format!("`{key}` is given twice"), "delete one of the lines".into()));
        }
        match key {
            "name" => self.name = Some(plain_name(line, value)?),
            "describe" => self.describe = Some(value.to_owned()),
            "ttl" => self.ttl = Some(duration(line, value)?),
            "max_age" => self.max_age = Some(duration(line, value)?),
            "client_max_age" => self.client_max_age = Some(duration(line, value)?),
            "s_maxage" => self.s_maxage = Some(duration(line, value)?),
            "namespace" => self.namespace = Some(plain_name(line, value)?),
            "tags" => self.tags.extend(list(value).map(|tag| (line, tag.to_owned()))),
            "page" => self.page = Some((line, PageBy::parse(value).map_err(|(what, hint)| (line, what, hint))?)),
            "max_rows" => {
                let rows = value.replace('_', "").parse().ok().filter(|rows| (1..=1_000_000).contains(rows));
                let wrong = || (line, format!("`{value}` is not a number of rows"), "write a number from 1 to 1000000".into());
                self.max_rows = Some(rows.ok_or_else(wrong)?);
            }
            "roles" => self.roles = Some(list(value).map(str::to_owned).collect()),
            "depends" => self.depends.extend(list(value).map(TableName::parse)),
            _ => self.param(line, value)?,
        }
        Ok(())
    }

    fn param(&mut self, line: usize, value: &str) -> Result<(), Wrong> {
        let (declared, default) = match value.split_once('=') {
            Some((declared, default)) => (declared.trim(), Some(default.trim())),
            None => (value, None),
        };
        let form = || "write `-- param: name type` or `-- param: name type = default`".to_owned();
        let Some((name, type_name)) = declared.split_once(char::is_whitespace) else {
            return Err((line, format!("parameter `{declared}` has no type"), form()));
        };
        let name = plain_name(line, name)?;
        let type_name = type_name.trim();
        if !is_type(type_name) {
            return Err((line, format!("`{type_name}` does not look like a type"), form()));
        }
        if self.params.iter().any(|param| param.name == name) {
            return Err((line, format!("parameter `{name}` is declared twice"), "delete one of the lines".into()));
        }
        let unquoted = |text: &str| match text.strip_prefix('\'').and_then(|text| text.strip_suffix('\'')) {
            Some(inner) => inner.replace("''", "'"),
            None => text.to_owned(),
        };
        self.params.push(Param { name, type_name: type_name.to_owned(), default: default.map(unquoted) });
        Ok(())
    }
    /// The tags, once every parameter is known.
    pub fn templates(&self) -> Result<Vec<TagTemplate>, Wrong> {
        let names: Vec<&str> = self.params.iter().map(|param| param.name.as_str()).collect();
        let parsed =
            self.tags.iter().map(|(line, text)| TagTemplate::parse(text, &names).map_err(|(what, hint)| (*line, what, hint)));
        parsed.collect()
    }
}

fn list(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn plain_name(line: usize, name: &str) -> Result<String, Wrong> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > 58 || !name.chars().all(plain) {
        let hint = "use at most 58 of the characters a-z, A-Z, 0-9, `_`, `-`, `.`".to_owned();
        return Err((line, format!("`{name}` cannot be a name"), hint));
    }
    Ok(name.to_owned())
}

/// Letters, digits, one length, brackets: nothing that could leave the place of a type in SQL.
fn is_type(text: &str) -> bool {
    let base = text.trim_end_matches("[]");
    let (name, rest) = base.split_once('(').map_or((base, None), |(name, rest)| (name, Some(rest)));
    let length = |rest: &str| {
        rest.strip_suffix(')').is_some_and(|n| !n.is_empty() && n.chars().all(|c| c.is_ascii_digit() || c == ',' || c == ' '))
    };
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | ' '))
        && rest.is_none_or(length)
}

fn duration(line: usize, text: &str) -> Result<Duration, Wrong> {
    let written = || {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit: u64 = match &text[digits.len()..] {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86400,
            _ => return None,
        };
        digits.parse::<u64>().ok()?.checked_mul(unit)
    };
    let seconds = named_ttl(text).map(|ttl| ttl.as_secs()).or_else(written);
    match seconds {
        Some(seconds) if (1..=30 * 86400).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        _ => Err((
            line,
            format!("`{text}` is not a duration from 1s to 30d"),
            "write 30s, 5m, 1h, 1d, or short, medium, long, very_long (30 s, 5 min, 1 h, 24 h)".into(),
        )),
    }
}
