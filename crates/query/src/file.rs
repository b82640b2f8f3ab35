//! A named query as its file declares it: a header of comments, then one read-only statement.
//!
//! Read at start by whoever serves queries. Every mistake names file, line and the mend; nothing is guessed.

use std::{fs, path::Path, sync::Arc, time::Duration};

use sqlparser::{
    ast::{Query, SetExpr, Statement},
    dialect::PostgreSqlDialect,
    parser::Parser,
};
use walcast_model::{TableName, named_ttl};

use crate::lex::{Token, lex};

/// Larger files are refused: a query is written by hand.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
const KEYS: [&str; 8] = ["name", "param", "ttl", "max_rows", "roles", "describe", "max_age", "depends"];
const DEFAULT_TTL: Duration = Duration::from_secs(5 * 60);
const DEFAULT_MAX_ROWS: usize = 1000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    pub name: String,
    /// As PostgreSQL spells types: `bigint`, `uuid[]`, `numeric(10,2)`.
    pub type_name: String,
    pub default: Option<String>,
}

#[derive(Debug, Clone)]
pub struct NamedQuery {
    pub name: String,
    pub describe: Option<String>,
    pub params: Vec<Param>,
    pub ttl: Duration,
    pub max_rows: usize,
    /// None: whoever may read the tables.
    pub roles: Option<Vec<String>>,
    /// The author accepts answers of this age, so the query may read the clock.
    pub max_age: Option<Duration>,
    /// Tables that the query reads where nobody can see it: behind functions.
    pub depends: Vec<TableName>,
    /// Without the closing semicolon.
    pub sql: String,
    /// None where our parser does not understand what PostgreSQL may well do.
    pub(crate) parsed: Option<Arc<Query>>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {what}; {hint}")]
pub struct QueryFileError {
    pub file: String,
    pub line: usize,
    pub what: String,
    pub hint: String,
}

/// What went wrong inside a file: line, sentence, mend.
type Wrong = (usize, String, String);

/// Every `*.sql` file of a folder, in the order of their names, or everything that is wrong with them.
pub fn load_dir(dir: &Path) -> Result<Vec<NamedQuery>, Vec<QueryFileError>> {
    let away = |error: std::io::Error| {
        vec![QueryFileError {
            file: dir.display().to_string(),
            line: 0,
            what: format!("the folder cannot be read: {error}"),
            hint: "create it, or name another in the settings".into(),
        }]
    };
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(away)? {
        let path = entry.map_err(away)?.path();
        if path.extension().is_some_and(|extension| extension == "sql") {
            paths.push(path);
        }
    }
    paths.sort();
    let (mut queries, mut errors) = (Vec::<NamedQuery>::new(), Vec::new());
    for path in paths {
        match load_file(&path) {
            Ok(query) if queries.iter().any(|known| known.name == query.name) => errors.push(QueryFileError {
                file: path.display().to_string(),
                line: 1,
                what: format!("a second query is named `{}`", query.name),
                hint: "give one of them another name".into(),
            }),
            Ok(query) => queries.push(query),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(queries) } else { Err(errors) }
}

fn load_file(path: &Path) -> Result<NamedQuery, QueryFileError> {
    let file = path.display().to_string();
    let wrong = |what: String, hint: &str| QueryFileError { file: file.clone(), line: 0, what, hint: hint.into() };
    let unreadable = |error: std::io::Error| wrong(format!("the file cannot be read: {error}"), "check its rights");
    let size = fs::metadata(path).map_err(unreadable)?.len();
    if size > MAX_FILE_BYTES {
        return Err(wrong(format!("the file has {size} bytes"), "a query file holds at most 1 MiB"));
    }
    let bytes = fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8(bytes).map_err(|_| wrong("the file is not UTF-8".into(), "save it as UTF-8"))?;
    NamedQuery::parse(&file, &text)
}

impl NamedQuery {
    /// `file` is only named in errors.
    pub fn parse(file: &str, text: &str) -> Result<NamedQuery, QueryFileError> {
        parse(text).map_err(|(line, what, hint)| QueryFileError { file: file.to_owned(), line, what, hint })
    }

    pub fn allows(&self, role: &str) -> bool {
        self.roles.as_ref().is_none_or(|roles| roles.iter().any(|allowed| allowed == role))
    }
}

fn parse(text: &str) -> Result<NamedQuery, Wrong> {
    let mut header = Header::default();
    let mut lines = 0;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() {
            lines = index + 1;
            continue;
        }
        let Some(comment) = line.strip_prefix("--") else { break };
        lines = index + 1;
        header.line(index + 1, comment.trim())?;
    }
    let body_line = lines + 1;
    let body = text.lines().skip(lines).collect::<Vec<_>>().join("\n");
    let name = header
        .name
        .ok_or_else(|| (1, "the query has no name".to_owned(), "begin the file with `-- name: my_query`".to_owned()))?;
    let sql = body.trim_end().trim_end_matches(';').trim_end().to_owned();
    check_params(body_line, &sql, &header.params)?;
    let parsed = check_statement(body_line, &sql)?;
    Ok(NamedQuery {
        name,
        describe: header.describe,
        params: header.params,
        ttl: header.ttl.unwrap_or(DEFAULT_TTL),
        max_rows: header.max_rows.unwrap_or(DEFAULT_MAX_ROWS),
        roles: header.roles,
        max_age: header.max_age,
        depends: header.depends,
        sql,
        parsed,
    })
}

#[derive(Default)]
struct Header {
    name: Option<String>,
    describe: Option<String>,
    params: Vec<Param>,
    ttl: Option<Duration>,
    max_rows: Option<usize>,
    roles: Option<Vec<String>>,
    max_age: Option<Duration>,
    depends: Vec<TableName>,
}

impl Header {
    fn line(&mut self, line: usize, comment: &str) -> Result<(), Wrong> {
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

fn check_params(line: usize, sql: &str, params: &[Param]) -> Result<(), Wrong> {
    let tokens = lex(sql);
    let used = |n: usize| tokens.contains(&Token::Param(n));
    for token in &tokens {
        if let Token::Param(n) = token
            && !(1..=params.len()).contains(n)
        {
            let what = format!("${n} is used, but {} parameters are declared", params.len());
            return Err((line, what, format!("declare it: `-- param: name type` as number {n}, counting from 1")));
        }
    }
    match params.iter().enumerate().find(|(index, _)| !used(index + 1)) {
        Some((index, param)) => Err((
            line,
            format!("parameter `{}` is declared, but ${} is not used", param.name, index + 1),
            "use it in the query or delete its line; parameters are numbered in the order of their lines".into(),
        )),
        None => Ok(()),
    }
}

fn check_statement(line: usize, sql: &str) -> Result<Option<Arc<Query>>, Wrong> {
    let tokens = lex(sql);
    let one = || "a file holds one SELECT, WITH, VALUES or TABLE".to_owned();
    let begins = tokens.iter().find(|token| **token != Token::Symbol('('));
    match begins {
        None => return Err((line, "the file holds no query".into(), one())),
        Some(token) if ["select", "with", "values", "table"].iter().any(|word| token.is_word(word)) => {}
        Some(_) => return Err((line, "the query does not begin with SELECT, WITH, VALUES or TABLE".into(), one())),
    }
    if tokens.contains(&Token::Symbol(';')) {
        return Err((line, "the file holds more than one statement".into(), one()));
    }
    let Ok(statements) = Parser::parse_sql(&PostgreSqlDialect {}, sql) else {
        // PostgreSQL will say whether it is wrong, in a read-only transaction; we then know the tables from its plan.
        return Ok(None);
    };
    match <[Statement; 1]>::try_from(statements) {
        Ok([Statement::Query(query)]) if reads_only(&query) => Ok(Some(Arc::new(*query))),
        _ => Err((line, "the query writes, locks rows or is not one SELECT".into(), one())),
    }
}

fn reads_only(query: &Query) -> bool {
    let with = query.with.iter().flat_map(|with| &with.cte_tables).all(|cte| reads_only(&cte.query));
    query.locks.is_empty() && with && body_reads_only(&query.body)
}

fn body_reads_only(body: &SetExpr) -> bool {
    match body {
        SetExpr::Select(select) => select.into.is_none(),
        SetExpr::Query(query) => reads_only(query),
        SetExpr::SetOperation { left, right, .. } => body_reads_only(left) && body_reads_only(right),
        SetExpr::Values(_) | SetExpr::Table(_) => true,
        SetExpr::Insert(_) | SetExpr::Update(_) | SetExpr::Delete(_) | SetExpr::Merge(_) => false,
    }
}

/// The known name that `word` was probably meant to be.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = |name: &'a str| (distance(word, name), name);
    let (distance, name) = known.into_iter().map(near).min()?;
    (distance <= 1 + word.chars().count() / 4).then_some(name)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let kept = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = kept.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
