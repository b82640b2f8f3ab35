//! `[[tags]]`: one rule of the file, as it was found and as it is in force. Whether it fits the database is the doctor's
//! question; here is what can be told from the text alone.

use walcast_engine::tag_template_error;

use super::{
    error::{Origin, SettingsError, nearest},
    resolved::Resolved,
    table::Setting,
    value::{Kind, Raw},
};

/// What a change of a table raises beside its own tags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagRuleSettings {
    /// For messages.
    pub place: String,
    pub table: String,
    pub on: Vec<String>,
    pub when_changed: Vec<String>,
    pub raise: Vec<String>,
    pub cascade: Option<String>,
    pub with: Vec<String>,
    pub reads: Vec<String>,
}

/// Before anyone knows which keys there are.
pub struct FoundRule {
    pub origin: Origin,
    pub keys: Vec<(String, Raw, Origin)>,
}

const OPERATIONS: [&str; 3] = ["insert", "update", "delete"];

const fn key(key: &'static str, kind: Kind, default: &'static str, example: &'static str, help: &'static str) -> Setting {
    Setting { key, kind, default, example, help, secret: false }
}

/// Keys of each `[[tags]]`; only the file has them.
pub const TAG_RULE: &[Setting] = &[
    key("table", Kind::Text, "", "\"enrolments\"", "The table whose changes raise it; `schema.table` outside `public`"),
    key(
        "on",
        Kind::List,
        "insert,update,delete",
        "[\"insert\", \"delete\"]",
        "Which changes; TRUNCATE always lets all of the rule's tags fall",
    ),
    key("when_changed", Kind::List, "", "[\"status\", \"grade\"]", "Only updates that changed one of these columns"),
    key(
        "raise",
        Kind::List,
        "",
        "[\"student:{student_id}\"]",
        "The tags: a word, a colon, columns in braces. `{column}` stands for the new row's value and the old one's, `{new.column}` and `{old.column}` for one",
    ),
    key(
        "cascade",
        Kind::Text,
        "",
        "\"select product_id from modules where id = $1\"",
        "A lookup whose columns `raise` may use too; asked after the commit, before anybody is told of it",
    ),
    key("with", Kind::List, "", "[\"module_id\"]", "The columns of the changed row that are the lookup's $1, $2, …"),
    key("reads", Kind::List, "", "[\"modules\"]", "Tables that the lookup reads inside of functions"),
];

/// None, and why, if the text alone is wrong.
pub fn take(found: FoundRule, errors: &mut Vec<SettingsError>) -> Option<TagRuleSettings> {
    let before = errors.len();
    let mut resolved = Resolved::default();
    for (key, raw, origin) in &found.keys {
        let name = format!("tags.{key}");
        match TAG_RULE.iter().find(|setting| setting.key == key) {
            None => errors.push(SettingsError::unknown(&name, origin, nearest(key, TAG_RULE.iter().map(|setting| setting.key)))),
            Some(setting) => match setting.kind.parse(raw) {
                Some(value) => drop(resolved.0.insert(setting.key, value)),
                None => errors.push(SettingsError::wrong(&name, setting, raw, origin)),
            },
        }
    }
    if errors.len() > before {
        return None;
    }
    let origin = |key: &str| found.keys.iter().find(|(name, ..)| name == key).map_or(&found.origin, |(.., origin)| origin);
    let mut wrong = |origin: &Origin, what: String, hint: &str| {
        errors.push(SettingsError { code: "wrong_setting", message: format!("{origin}: {what}"), hint: Some(hint.to_owned()) });
    };
    let rule = TagRuleSettings {
        place: format!("[[tags]] at {}", found.origin),
        table: resolved.optional_text("table").unwrap_or_default(),
        on: if resolved.0.contains_key("on") { resolved.list("on") } else { OPERATIONS.map(str::to_owned).to_vec() },
        when_changed: resolved.list("when_changed"),
        raise: resolved.list("raise"),
        cascade: resolved.optional_text("cascade"),
        with: resolved.list("with"),
        reads: resolved.list("reads"),
    };
    if rule.table.is_empty() {
        wrong(&found.origin, "a rule for tags has no `table`".into(), "[[tags]]\ntable = \"enrolments\"");
    } else if rule.raise.is_empty() {
        wrong(&found.origin, "a rule for tags has no `raise`".into(), "raise = [\"student:{student_id}\"]");
    }
    if let Some(why) = rule.raise.iter().find_map(|template| tag_template_error(template)) {
        wrong(origin("raise"), why, "raise = [\"student:{student_id}\"]");
    }
    if let Some(unknown) = rule.on.iter().find(|name| !OPERATIONS.contains(&name.as_str())) {
        wrong(origin("on"), format!("`{unknown}` is no operation"), "insert, update, delete");
    }
    match (&rule.cascade, rule.with.is_empty(), rule.reads.is_empty()) {
        (Some(_), true, _) => {
            wrong(
                origin("cascade"),
                "a cascade needs `with`: the columns that are its $1, $2, …".into(),
                "with = [\"module_id\"]",
            );
        }
        (None, false, _) => {
            wrong(origin("with"), "`with` belongs to a `cascade`".into(), "cascade = \"select … where id = $1\"");
        }
        (None, _, false) => {
            wrong(origin("reads"), "`reads` belongs to a `cascade`".into(), "cascade = \"select … where id = $1\"");
        }
        _ => {}
    }
    (errors.len() == before).then_some(rule)
}
