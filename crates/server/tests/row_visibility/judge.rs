//! What PostgreSQL shows to whom, and whether what was heard is more, or less, than that.
//! Knows nothing of Walcast: it reads as the role, with the claims, right before and right after each write.

use std::fmt::Write;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use tokio_postgres::{Client, SimpleQueryMessage};
use walcast_testkit::jwt;

pub type Row = Map<String, Value>;

/// A role and its claims.
#[derive(Debug, Clone)]
pub struct Identity {
    pub name: &'static str,
    pub role: &'static str,
    pub subject: Option<&'static str>,
    /// Claims beside role and subject.
    pub claims: Value,
}

impl Identity {
    pub fn token(&self, secret: &str) -> String {
        jwt(secret, self.role, self.subject, 3600, self.claims.clone())
    }

    fn claims_json(&self) -> String {
        let mut all = json!({ "role": self.role });
        if let Some(subject) = self.subject {
            all["sub"] = json!(subject);
        }
        if let (Value::Object(all), Value::Object(more)) = (&mut all, &self.claims) {
            all.extend(more.clone());
        }
        all.to_string()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Insert,
    Update,
    Delete,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Insert => "INSERT",
            Kind::Update => "UPDATE",
            Kind::Delete => "DELETE",
        }
    }
}

/// One row that a transaction wrote.
#[derive(Debug, Clone)]
pub struct Touch {
    pub table: String,
    /// Bare name of the key column that tells rows apart.
    pub key: &'static str,
    pub kind: Kind,
    /// The row's key before and after: they differ where the UPDATE changed it.
    pub before: i64,
    pub after: i64,
    /// The whole old row is in the WAL.
    pub full: bool,
    /// Nothing may be missing: the policy is ordinary and no rule moved in this transaction.
    pub complete: bool,
}

/// What one identity could read of a touched row.
#[derive(Debug, Clone, Default)]
pub struct Sight {
    pub before: Option<Row>,
    pub after: Option<Row>,
    pub columns: Vec<String>,
}

/// Columns that the identity's role may select.
pub async fn columns(client: &Client, who: &Identity, table: &str) -> Result<Vec<String>> {
    let sql = "select a.attname::text from pg_attribute a where a.attrelid = format('public.%I', $1::text)::regclass and a.attnum > 0 \
               and not a.attisdropped and has_column_privilege($2::text, a.attrelid, a.attnum, 'select') order by a.attnum";
    let rows = client.query(sql, &[&table, &who.role]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The row as the identity reads it now; none if it sees no such row, may not read the table, or the read fails.
pub async fn sees(client: &Client, who: &Identity, table: &str, key: &str, id: i64, columns: &[String]) -> Result<Option<Row>> {
    if columns.is_empty() {
        return Ok(None);
    }
    let ident = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let list: Vec<String> = columns.iter().map(|column| ident(column)).collect();
    let sql = format!(
        "begin; set local timezone = 'UTC'; set local \"request.jwt.claims\" = '{claims}'; \
         set local \"request.jwt.claim.sub\" = '{sub}'; set local role {role}; \
         select to_jsonb(x)::text from (select {list} from public.{table} where {key} = {id}) x; rollback",
        claims = who.claims_json().replace('\'', "''"),
        sub = who.subject.unwrap_or_default(),
        role = who.role,
        list = list.join(", "),
        table = ident(table),
        key = ident(key),
    );
    match client.simple_query(&sql).await {
        Ok(answer) => {
            for message in answer {
                if let SimpleQueryMessage::Row(row) = message {
                    return Ok(Some(serde_json::from_str(row.get(0).context("a row without text")?)?));
                }
            }
            Ok(None)
        }
        // No right to read, or a policy that PostgreSQL refuses to run: it shows nothing.
        Err(error) if error.as_db_error().is_some() => {
            client.batch_execute("rollback").await?;
            Ok(None)
        }
        Err(error) => bail!(error),
    }
}

#[derive(Debug, Default)]
pub struct Finding {
    pub leaks: Vec<String>,
    pub missing: Vec<String>,
    /// Events that were heard rightly.
    pub right: usize,
}

/// Compares what one subscriber heard of one transaction with what its identity could read.
pub fn judge(touches: &[Touch], sights: &[Sight], heard: &[Value], resync: bool) -> Finding {
    let mut finding = Finding::default();
    let mut met = vec![0_usize; touches.len()];
    for event in heard {
        let Some(at) = touches.iter().position(|touch| is_of(event, touch)) else {
            finding.leaks.push(format!("heard of a row that no write touched: {event}"));
            continue;
        };
        met[at] += 1;
        let before_leaks = finding.leaks.len();
        look(event, &touches[at], &sights[at], &mut finding);
        if finding.leaks.len() == before_leaks {
            finding.right += 1;
        }
    }
    for ((touch, sight), met) in touches.iter().zip(sights).zip(met) {
        let due = match touch.kind {
            Kind::Delete => sight.before.is_some() && touch.full,
            _ => sight.after.is_some(),
        };
        if met > 1 {
            finding.missing.push(format!("told {met} times of one {} on {}", touch.kind.name(), touch.table));
        }
        if due && met == 0 && touch.complete && !resync {
            let mut text = format!("not told of {} on {} {}", touch.kind.name(), touch.table, touch.after);
            let _ = write!(text, ": PostgreSQL shows {:?}", sight.after.as_ref().or(sight.before.as_ref()));
            finding.missing.push(text);
        }
    }
    finding
}

fn is_of(event: &Value, touch: &Touch) -> bool {
    let (image, key) = if touch.kind == Kind::Delete { ("old_record", touch.before) } else { ("record", touch.after) };
    event["table"] == touch.table.as_str()
        && event["type"] == touch.kind.name()
        // A key that may not be selected is not there; then the table must do.
        && event[image].get(touch.key).is_none_or(|id| *id == key)
}

fn look(event: &Value, touch: &Touch, sight: &Sight, finding: &mut Finding) {
    let what = format!("{} on {} {}→{}", touch.kind.name(), touch.table, touch.before, touch.after);
    let mut leak = |text: String| finding.leaks.push(format!("{what}: {text}; {event}"));
    let visible = if touch.kind == Kind::Delete { &sight.before } else { &sight.after };
    let Some(visible) = visible else { return leak("told of a row that PostgreSQL does not show".into()) };
    for column in event["columns"].as_array().into_iter().flatten() {
        if !sight.columns.iter().any(|known| column["name"] == known.as_str()) {
            leak(format!("column {} may not be selected", column["name"]));
        }
    }
    if touch.kind != Kind::Delete {
        for (name, value) in event["record"].as_object().into_iter().flatten() {
            if visible.get(name) != Some(value) {
                leak(format!("record says {name} = {value}, PostgreSQL shows {:?}", visible.get(name)));
            }
        }
    } else if event.get("record").is_some() {
        leak("a DELETE has a record".into());
    }
    for (name, value) in event["old_record"].as_object().into_iter().flatten() {
        let shown_before = sight.before.as_ref().is_some_and(|row| row.get(name) == Some(value));
        // The old key tells nothing where the new row, which is shown, has the same.
        let same_key = touch.before == touch.after && visible.get(name) == Some(value) && (name == touch.key || name == "region");
        if !shown_before && !same_key {
            leak(format!("old_record says {name} = {value}, which was not to be seen before"));
        }
    }
    if touch.complete {
        let lacking = |image: &str, row: &Row| {
            let has = |name: &String| event[image].get(name).is_some() || (name == "long" && image == "record");
            sight.columns.iter().find(|name| row.contains_key(*name) && !has(name)).cloned()
        };
        if touch.kind != Kind::Delete
            && let Some(name) = lacking("record", visible)
        {
            finding.missing.push(format!("{what}: record lacks {name}: {event}"));
        }
        if let (true, Some(before), true) = (touch.kind != Kind::Insert, &sight.before, touch.full)
            && let Some(name) = lacking("old_record", before)
        {
            finding.missing.push(format!("{what}: old_record lacks {name}: {event}"));
        }
    }
}
