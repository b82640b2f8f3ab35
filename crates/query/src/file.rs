//! A named query as its file declares it: a header of comments, then one read-only statement.
//!
//! Read at start by whoever serves queries. Every mistake names file, line and the mend; nothing is guessed.

use std::{fs, path::Path, sync::Arc, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use sqlparser::{
    ast::{Query, SetExpr, Statement},
    dialect::PostgreSqlDialect,
    parser::Parser,
};
use walcast_model::TableName;

use crate::{
    header::Header,
    lex::{Token, lex},
    page::PageBy,
    template::TagTemplate,
};

/// Larger files are refused: a query is written by hand.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
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
    /// None: what its namespace or the cache says.
    pub ttl: Option<Duration>,
    /// The configured namespace whose policy the answers follow.
    pub namespace: Option<String>,
    /// Beside what the rows raise.
    pub tags: Vec<TagTemplate>,
    pub max_rows: usize,
    /// None: whoever may read the tables.
    pub roles: Option<Vec<String>>,
    /// The author accepts answers of this age, so the query may read the clock.
    pub max_age: Option<Duration>,
    /// Tables that the query reads where nobody can see it: behind functions.
    pub depends: Vec<TableName>,
    /// Answered page by page.
    pub page: Option<PageBy>,
    /// How long a client may reuse an answer without asking.
    pub client_max_age: Option<Duration>,
    /// How long a shared cache may, where the answer is the same for everybody.
    pub s_maxage: Option<Duration>,
    /// Without the closing semicolon.
    pub sql: String,
    /// Hash of everything that an answer and its keeping hang on: another file has other keys.
    pub meaning: String,
    pub file: String,
    /// Where `sql` begins in the file.
    pub(crate) first_line: usize,
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
pub(crate) type Wrong = (usize, String, String);

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
        parse(file, text).map_err(|(line, what, hint)| QueryFileError { file: file.to_owned(), line, what, hint })
    }

    pub fn allows(&self, role: &str) -> bool {
        self.roles.as_ref().is_none_or(|roles| roles.iter().any(|allowed| allowed == role))
    }
}

fn parse(file: &str, text: &str) -> Result<NamedQuery, Wrong> {
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
    let first_line = lines + 1;
    let body = text.lines().skip(lines).collect::<Vec<_>>().join("\n");
    let name = header
        .name
        .clone()
        .ok_or_else(|| (1, "the query has no name".to_owned(), "begin the file with `-- name: my_query`".to_owned()))?;
    let sql = body.trim_end().trim_end_matches(';').trim_end().to_owned();
    check_params(first_line, &sql, &header.params)?;
    let parsed = check_statement(first_line, &sql)?;
    let tags = header.templates()?;
    let page = match &header.page {
        None => None,
        Some((line, page)) => {
            let names = header.params.iter().map(|param| param.name.as_str());
            let (name, size) = (page.clone(), header.max_rows.unwrap_or(DEFAULT_MAX_ROWS));
            Some(name.of(parsed.as_deref(), names, size).map_err(|(what, hint)| (*line, what, hint))?)
        }
    };
    let mut query = NamedQuery {
        name,
        describe: header.describe,
        params: header.params,
        ttl: header.ttl,
        namespace: header.namespace,
        tags,
        max_rows: header.max_rows.unwrap_or(DEFAULT_MAX_ROWS),
        roles: header.roles,
        max_age: header.max_age,
        depends: header.depends,
        page,
        client_max_age: header.client_max_age,
        s_maxage: header.s_maxage,
        sql,
        meaning: String::new(),
        file: file.to_owned(),
        first_line,
        parsed,
    };
    query.meaning = meaning(&query);
    Ok(query)
}

/// Of all but what only people and HTTP caches read.
fn meaning(query: &NamedQuery) -> String {
    let NamedQuery { params, ttl, namespace, tags, max_rows, roles, max_age, depends, page, sql, .. } = query;
    let text = format!("{:?}", (params, ttl, namespace, tags, max_rows, roles, max_age, depends, page, sql));
    digest(&SHA256, text.as_bytes()).as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
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
