//! Defaults, file, environment and flags laid over each other. Every mistake is collected before anyone is told.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use walcast_engine::config::NamespaceSettings;

use super::{
    Settings, SettingsErrors, TagRuleSettings,
    error::{Origin, SettingsError, nearest},
    file,
    namespace::{Given, check_shares},
    resolved::Resolved,
    table::{FALLBACK_ENV, FIXED_ENV, PROCESS_ENV, SETTINGS, Setting},
    tag_rule,
    value::{Raw, Value},
};

/// Where settings come from, handed in, so that tests need no process of their own.
#[derive(Debug, Default, Clone)]
pub struct Inputs {
    /// Where `walcast.toml` is looked for.
    pub directory: PathBuf,
    pub env: Vec<(String, String)>,
    /// Key and value of each flag.
    pub flags: Vec<(String, String)>,
    /// `--config`.
    pub config: Option<PathBuf>,
    /// Name and text of a file that stands in where none is named and none is found.
    pub instead: Option<(&'static str, &'static str)>,
}

#[derive(Debug)]
pub struct Loaded {
    pub settings: Settings,
    /// In the table's order, for `walcast config`.
    pub effective: Vec<Effective>,
}

/// One setting as it is in force; a secret's value is not here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    pub key: &'static str,
    pub shown: String,
    pub origin: String,
}

const FILE_NAME: &str = "walcast.toml";
const FILE_SUFFIX: &str = "_FILE";

#[derive(Default)]
struct Layers {
    values: HashMap<&'static str, (Raw, Value, Origin)>,
    namespaces: BTreeMap<String, Given>,
    tags: Vec<TagRuleSettings>,
    errors: Vec<SettingsError>,
}

pub fn load(inputs: &Inputs) -> Result<Loaded, SettingsErrors> {
    let mut layers = Layers::default();
    for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
        layers.set(setting, Raw::Text(setting.default.to_owned()), Origin::Default);
    }
    layers.read_file(inputs);
    layers.read_env(&inputs.env);
    for (key, text) in &inputs.flags {
        match Setting::find(key) {
            Some(setting) => layers.set(setting, Raw::Text(text.clone()), Origin::Flag(setting.flag())),
            None => layers.errors.push(SettingsError::unknown(key, &Origin::Flag(key.clone()), None)),
        }
    }
    layers.finish()
}

impl Layers {
    fn set(&mut self, setting: &'static Setting, raw: Raw, origin: Origin) {
        match setting.kind.parse(&raw) {
            Some(value) => drop(self.values.insert(setting.key, (raw, value, origin))),
            None => self.errors.push(SettingsError::wrong(setting.key, setting, &raw, &origin)),
        }
    }

    fn read_file(&mut self, inputs: &Inputs) {
        let named =
            |name: &str| inputs.env.iter().find(|(n, v)| n == name && !v.is_empty()).map(|(_, value)| PathBuf::from(value));
        let explicit = inputs.config.clone().or_else(|| named("WALCAST_CONFIG"));
        let path = match &explicit {
            Some(path) => inputs.directory.join(path),
            None => inputs.directory.join(FILE_NAME),
        };
        let shown = explicit.as_deref().unwrap_or(Path::new(FILE_NAME)).display().to_string();
        let (shown, text) = match (std::fs::read_to_string(&path), &inputs.instead) {
            (Ok(text), _) => (shown, text),
            (Err(error), instead) if explicit.is_none() && error.kind() == std::io::ErrorKind::NotFound => match instead {
                Some((name, text)) => ((*name).to_owned(), (*text).to_owned()),
                None => return,
            },
            (Err(error), _) => {
                let hint = Some(
                    "it is named by --config or WALCAST_CONFIG; without either, walcast.toml in the working directory is read",
                );
                self.errors.push(SettingsError::unreadable(&shown, "the settings file", error, hint));
                return;
            }
        };
        match file::read(&text, &shown) {
            Ok(contents) => {
                contents.found.into_iter().for_each(|found| self.take_found(found));
                self.tags.extend(contents.rules.into_iter().filter_map(|rule| tag_rule::take(rule, &mut self.errors)));
            }
            Err(error) => self.errors.push(error),
        }
    }

    fn take_found(&mut self, found: file::Found) {
        if let Some(namespace) = &found.namespace {
            return self.take_namespace(namespace.clone(), found);
        }
        match Setting::find(&found.key) {
            Some(setting) => self.set(setting, found.raw, found.origin),
            None if SETTINGS.iter().any(|s| s.key.starts_with(&format!("{}.", found.key)))
                && found.raw == Raw::Other("an empty section".into()) => {}
            None => {
                // The last part may be right under another section.
                let near = nearest(&found.key, SETTINGS.iter().map(|setting| setting.key));
                self.errors.push(SettingsError::unknown(&found.key, &found.origin, near));
            }
        }
    }

    fn take_namespace(&mut self, name: String, found: file::Found) {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
            self.errors.push(SettingsError {
                code: "wrong_setting",
                message: format!("{}: `{name}` cannot name a cache namespace", found.origin),
                hint: Some("1 to 64 of the characters a-z, A-Z, 0-9, `_`, `-`, `.`".into()),
            });
            return;
        }
        // The folder of queries names these, and each file says how its answers live.
        if name.starts_with("query.") {
            self.errors.push(SettingsError {
                code: "wrong_setting",
                message: format!("{}: namespace `{name}` belongs to a query", found.origin),
                hint: Some("say `-- ttl: 5m` in the query's file".into()),
            });
            return;
        }
        let given = self.namespaces.entry(name.clone()).or_default();
        if found.key.is_empty() {
            return;
        }
        if let Err(error) = given.take(&name, &found.key, found.raw, &found.origin) {
            self.errors.push(error);
        }
    }

    fn read_env(&mut self, env: &[(String, String)]) {
        let mut seen: HashMap<&'static str, String> = HashMap::new();
        // An empty variable is an unset one: compose files and CI pass those on.
        for (name, text) in env.iter().filter(|(name, text)| name.starts_with("WALCAST_") && !text.is_empty()) {
            if is_process_variable(name) {
                continue;
            }
            let Some((setting, from_file)) = setting_of(name) else {
                let known: Vec<String> = SETTINGS.iter().map(Setting::env).chain(["WALCAST_CONFIG".into()]).collect();
                let near = nearest(name, known.iter().map(String::as_str));
                self.errors.push(SettingsError::unknown(name, &Origin::Env(name.clone()), near));
                continue;
            };
            if let Some(other) = seen.insert(setting.key, name.clone()) {
                self.errors.push(SettingsError {
                    code: "wrong_setting",
                    message: format!("environment variables {other} and {name} both set `{}`", setting.key),
                    hint: Some("unset one of them".into()),
                });
                continue;
            }
            let text = if from_file { self.secret_from(name, text) } else { Some(text.clone()) };
            if let Some(text) = text {
                self.set(setting, Raw::Text(text), Origin::Env(name.clone()));
            }
        }
        let (name, key) = FALLBACK_ENV;
        let fallback = env.iter().find(|(n, text)| n == name && !text.is_empty());
        if let (Some((_, text)), Some(setting), false) = (fallback, Setting::find(key), seen.contains_key(key)) {
            self.set(setting, Raw::Text(text.clone()), Origin::Env(name.to_owned()));
        }
    }

    /// One newline at the end belongs to the editor, not to the secret.
    fn secret_from(&mut self, name: &str, path: &str) -> Option<String> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let text = text.strip_suffix('\n').unwrap_or(&text);
                Some(text.strip_suffix('\r').unwrap_or(text).to_owned())
            }
            Err(error) => {
                let what = format!("the file that {name} names,");
                self.errors.push(SettingsError::unreadable(
                    path,
                    &what,
                    error,
                    Some("mount the secret there, readable by this user"),
                ));
                None
            }
        }
    }

    fn finish(mut self) -> Result<Loaded, SettingsErrors> {
        let namespaces = self.namespaces();
        if !self.errors.is_empty() {
            return Err(SettingsErrors(self.errors));
        }
        let effective = SETTINGS
            .iter()
            .map(|setting| match self.values.get(setting.key) {
                None => Effective { key: setting.key, shown: "(not set)".into(), origin: "default".into() },
                Some((raw, _, origin)) => {
                    let shown = if setting.secret { "(secret)".into() } else { raw.shown() };
                    Effective { key: setting.key, shown, origin: origin.to_string() }
                }
            })
            .collect();
        let mut resolved = Resolved(self.values.into_iter().map(|(key, (_, value, _))| (key, value)).collect());
        let settings = Settings { tags: self.tags, ..Settings::from_resolved(&mut resolved, namespaces) };
        Ok(Loaded { settings, effective })
    }

    fn namespaces(&mut self) -> BTreeMap<String, NamespaceSettings> {
        let number = |key| match self.values.get(key) {
            Some((_, Value::Number(number), _)) => *number,
            // Wrong, and told already.
            _ => 0,
        };
        let (l1_bytes, max_value_bytes) = (number("cache.l1_bytes"), number("cache.max_value_bytes"));
        let mut shares = Vec::new();
        let mut namespaces = BTreeMap::new();
        for (name, given) in std::mem::take(&mut self.namespaces) {
            let origin = given.origin("share");
            let settings = given.settings(&name, l1_bytes, &mut self.errors);
            if let Some(bytes) = settings.entries.l1_bytes {
                shares.push((name.clone(), bytes, origin));
            }
            namespaces.insert(name, settings);
        }
        if l1_bytes > 0 {
            self.errors.extend(check_shares(&shares, l1_bytes, max_value_bytes));
        }
        namespaces
    }
}

fn is_process_variable(name: &str) -> bool {
    PROCESS_ENV.iter().any(|known| match known.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == *known,
    })
}

/// The setting that a variable means, and whether it names a file.
fn setting_of(name: &str) -> Option<(&'static Setting, bool)> {
    let by_name = |name: &str| {
        let fixed = FIXED_ENV.iter().find(|(fixed, _)| *fixed == name).and_then(|(_, key)| Setting::find(key));
        fixed.or_else(|| SETTINGS.iter().find(|setting| setting.nested_env() == name))
    };
    if let Some(setting) = by_name(name) {
        return Some((setting, false));
    }
    by_name(name.strip_suffix(FILE_SUFFIX)?).filter(|setting| setting.secret).map(|setting| (setting, true))
}
