//! `walcast.toml` as a flat list of keys and raw values, each with its line. Knows nothing of which keys exist
//! but for the shapes of `[cache.namespaces.NAME]` and `[[tags]]`.

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    error::{Origin, SettingsError},
    tag_rule::FoundRule,
    value::Raw,
};

pub struct Found {
    /// `cache.l1_bytes`; inside a namespace only the last part.
    pub key: String,
    pub namespace: Option<String>,
    pub raw: Raw,
    pub origin: Origin,
}

/// What a file says, in its order.
#[derive(Default)]
pub struct Contents {
    pub found: Vec<Found>,
    pub rules: Vec<FoundRule>,
}

pub fn read(text: &str, path: &str) -> Result<Contents, SettingsError> {
    let table = DeTable::parse(text).map_err(|error| {
        let place = error.span().map_or_else(String::new, |span| format!(" line {}", line_of(text, span.start)));
        SettingsError {
            code: "wrong_file",
            message: format!("{path}{place}: this is not TOML: {}", error.message()),
            hint: Some("settings are written as `[cache]` and below it `l1_bytes = \"64MiB\"`".into()),
        }
    })?;
    let mut contents = Contents::default();
    let mut reader = Reader { text, path, found: &mut contents.found, rules: &mut contents.rules };
    reader.table(table.get_ref(), "");
    Ok(contents)
}

struct Reader<'a> {
    text: &'a str,
    path: &'a str,
    found: &'a mut Vec<Found>,
    rules: &'a mut Vec<FoundRule>,
}

const NAMESPACES: &str = "cache.namespaces";
const TAGS: &str = "tags";

impl Reader<'_> {
    fn table(&mut self, table: &DeTable<'_>, prefix: &str) {
        for (name, value) in table {
            let key = if prefix.is_empty() { name.get_ref().to_string() } else { format!("{prefix}.{}", name.get_ref()) };
            match value.get_ref() {
                DeValue::Table(inner) if key == NAMESPACES => self.namespaces(inner),
                DeValue::Array(items) if key == TAGS => items.iter().for_each(|item| self.rule(item, name.span().start)),
                DeValue::Table(inner) if !inner.is_empty() => self.table(inner, &key),
                // An empty section says nothing, but its name may be misspelt.
                DeValue::Table(_) => self.push(key, None, Raw::Other("an empty section".into()), name.span().start),
                _ => self.value(key, None, value, name.span().start),
            }
        }
    }

    /// Its place is that of its first key.
    fn rule(&mut self, item: &Spanned<DeValue<'_>>, list_start: usize) {
        let at = |start: usize| Origin::File { path: self.path.to_owned(), line: line_of(self.text, start) };
        let DeValue::Table(table) = item.get_ref() else {
            // No table of a list: as one without a key, it is told how a rule is written.
            return self.rules.push(FoundRule { origin: at(list_start), keys: Vec::new() });
        };
        let keys: Vec<_> =
            table.iter().map(|(key, value)| (key.get_ref().to_string(), raw(value.get_ref()), at(key.span().start))).collect();
        let first = table.iter().map(|(key, _)| key.span().start).min();
        let origin = at(first.unwrap_or_else(|| item.span().start));
        self.rules.push(FoundRule { origin, keys });
    }

    fn namespaces(&mut self, table: &DeTable<'_>) {
        for (name, value) in table {
            let namespace = name.get_ref().to_string();
            match value.get_ref() {
                DeValue::Table(inner) if inner.is_empty() => {
                    self.push(String::new(), Some(namespace), Raw::Other("an empty section".into()), name.span().start);
                }
                DeValue::Table(inner) => {
                    for (key, value) in inner {
                        self.value(key.get_ref().to_string(), Some(namespace.clone()), value, key.span().start);
                    }
                }
                _ => self.push(format!("{NAMESPACES}.{namespace}"), None, Raw::Other("a value".into()), name.span().start),
            }
        }
    }

    fn value(&mut self, key: String, namespace: Option<String>, value: &Spanned<DeValue<'_>>, start: usize) {
        self.push(key, namespace, raw(value.get_ref()), start);
    }

    fn push(&mut self, key: String, namespace: Option<String>, raw: Raw, start: usize) {
        let origin = Origin::File { path: self.path.to_owned(), line: line_of(self.text, start) };
        self.found.push(Found { key, namespace, raw, origin });
    }
}

fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Boolean(flag) => Raw::Flag(*flag),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Raw::Other("a number out of range".into()), Raw::Number),
        DeValue::Array(items) => {
            let texts: Option<Vec<String>> = items.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect();
            texts.map_or_else(|| Raw::Other("an array of other things than text".into()), Raw::List)
        }
        DeValue::Float(_) => Raw::Other("a number with a fraction".into()),
        DeValue::Datetime(_) => Raw::Other("a date".into()),
        DeValue::Table(_) => Raw::Other("a section".into()),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes().iter().take(offset).filter(|byte| **byte == b'\n').count() + 1
}
