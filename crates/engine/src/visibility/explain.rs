//! Why these claims do or do not get a row: the same judge, asked about a row that is named instead of streamed.
//!
//! Called by the admin endpoint for an operator. Shows policies, claims' part in them and a row read as `service_role`; changes
//! nothing. What it says of `sees` is the judge's own verdict, everything else is why.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tokio_postgres::types::{ToSql, Type};
use walcast_auth::{
    PolicyText, Question, RowRule, Rules,
    policy::{Answer, Policy},
    row_visibility::{self, Asking},
};
use walcast_model::{
    Cell, Change, Claims, Column, Commit, Item, Operation, ReplicaIdentity, Row, Scope, Table, TableName, ValueKind,
};
use walcast_pg::{Envelope, PgError, quote_ident};

use super::{ASK_TIMEOUT, Caller, OfRole, OldView, Placed, Verdict, ask, judge, remembered};
use crate::{Core, Engine, pipeline::Remembered};

/// The row that is asked about.
#[derive(Debug, Clone)]
pub enum RowAsked {
    /// One of the table's, by the values of some of its columns.
    Key(Map<String, Value>),
    /// One that need not be there; columns that it does not name are null.
    Image(Map<String, Value>),
}

#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error("there is no table {0}")]
    NoTable(TableName),
    #[error("{0} has no column `{1}`")]
    NoColumn(TableName, String),
    #[error("{0} has no such row, or service_role may not read it")]
    NoRow(TableName),
    #[error("the row cannot be read: {0}")]
    Row(PgError),
    #[error(transparent)]
    Database(PgError),
}

const DOING: &str = "reading a row to explain who sees it";

impl Engine {
    /// A document for people and programs: the verdict, and everything that it rests on.
    pub async fn explain_visibility(&self, table: &TableName, claims: &Claims, row: &RowAsked) -> Result<Value, ExplainError> {
        let core = &*self.core;
        let rules = core.rules.find(core, table, claims).await.map_err(ExplainError::Database)?;
        let rules = rules.ok_or_else(|| ExplainError::NoTable(table.clone()))?;
        let (described, image) = read(core, &rules, row).await?;
        let old = match described.identity {
            ReplicaIdentity::Full => image.clone(),
            _ => Row(described
                .columns
                .iter()
                .zip(&image.0)
                .map(|(c, cell)| if c.key { cell.clone() } else { Cell::Absent })
                .collect()),
        };
        let change = |operation, new: Option<&Row>, old: Option<&Row>| Change {
            table: described.clone(),
            operation,
            new: new.cloned(),
            old: old.cloned(),
        };
        let changes = [
            change(Operation::Insert, Some(&image), None),
            change(Operation::Update, Some(&image), Some(&old)),
            change(Operation::Delete, None, Some(&old)),
        ];
        // As if it were committed now, under the rules of now.
        let commit = Remembered {
            commit: Arc::new(Commit {
                lsn: core.progress.read_to(),
                end_lsn: core.progress.read_to(),
                xid: 0,
                committed_at_us: 0,
                scope: Scope::Whole(changes.iter().cloned().enumerate().map(|(at, c)| (at as u32, Item::Change(c))).collect()),
                size_bytes: 0,
            }),
            xid: core.progress.xmax().max(rules.changed_by),
        };
        let placed = |(at, change)| Placed { commit: &commit, index: at, change };
        // Before the judge: what it is answered now would be remembered.
        let (way, why_not) = way(core, &rules, claims, &commit, &described, &image).await;
        let of_role = OfRole {
            changes: (0_u32..).zip(&changes).map(placed).collect(),
            callers: vec![Caller { claims: claims.clone(), wants: vec![(0, 0), (1, 1), (2, 2)] }],
        };
        let mut verdicts = vec![Verdict::Hide; changes.len()];
        for (at, verdict) in judge::judge(core, &of_role).await {
            verdicts[at] = verdict;
        }

        let shown: Vec<&str> = rules.columns.iter().filter(|column| column.visible).map(|column| column.name.as_str()).collect();
        let withheld: Vec<&str> = rules.columns.iter().filter(|column| !column.visible).map(|c| c.name.as_str()).collect();
        let policies = policies(core, &rules, claims, &described, &image).await;
        let question = match &rules.rows {
            RowRule::Ask(question) => Some(&**question),
            _ => None,
        };
        let [inserts, updates, deletes] = rules.published.unwrap_or_default();
        let told = |verdict: &Verdict, changes: &str| {
            let (told, why) = told(verdict);
            let old = match verdict {
                Verdict::Show { old: OldView::Whole, .. } => "whole, as far as the replica identity holds it",
                Verdict::Show { old: OldView::Key, .. } => "its key",
                _ => "nothing",
            };
            json!({ "told": told, "why": why, "old_record": (changes != "INSERT").then_some(old) })
        };
        Ok(json!({
            "table": rules.name.to_string(), "role": claims.role(), "claims": serde_json::from_str::<Value>(claims.json()).unwrap_or_default(),
            "sees": matches!(verdicts[0], Verdict::Show { .. } | Verdict::Error { .. }),
            "why": why(&rules, &verdicts[0], &policies),
            "published": {
                "to_clients": rules.published.is_some(), "publication": core.config.publication_realtime,
                "insert": inserts, "update": updates, "delete": deletes,
            },
            "privileges": { "table": rules.readable, "columns_shown": shown, "columns_withheld": withheld },
            "row_security": match &rules.rows { RowRule::All => "off for this role", RowRule::Nobody => "on, and no policy admits this role", RowRule::Ask(_) => "on" },
            "policies": policies,
            "row_filter": question.and_then(|question| question.row_filter.clone()),
            "decided": way, "not_in_memory_because": why_not,
            "remembered_until_a_table_moves": question.is_some_and(|question| question.rememberable),
            "reads": question.map(reads),
            "replica_identity": format!("{:?}", described.identity).to_lowercase(),
            "row": as_json(&described, &image, &rules),
            "insert": told(&verdicts[0], "INSERT"), "update": told(&verdicts[1], "UPDATE"), "delete": told(&verdicts[2], "DELETE"),
        }))
    }
}

/// The row in the text forms that the stream uses, and the table as the stream would describe it.
async fn read(core: &Core, rules: &Rules, asked: &RowAsked) -> Result<(Arc<Table>, Row), ExplainError> {
    let (RowAsked::Key(named) | RowAsked::Image(named)) = asked;
    if let Some(wrong) = named.keys().find(|name| rules.column(name).is_none()) {
        return Err(ExplainError::NoColumn(rules.name.clone(), wrong.clone()));
    }
    let table = format!("{}.{}", quote_ident(rules.name.schema()), quote_ident(rules.name.table()));
    let cells: Vec<String> = rules.columns.iter().map(|column| quote_ident(&column.name)).collect();
    let cells: Vec<String> =
        cells.iter().map(|c| format!("case when walcast_row.{c} is null then null else concat(walcast_row.{c}) end")).collect();
    let given = format!("pg_catalog.jsonb_populate_record(null::{table}, $1::text::jsonb)");
    let from = match asked {
        RowAsked::Image(_) => format!("{given} as walcast_row"),
        RowAsked::Key(key) => {
            let same = key
                .keys()
                .map(|name| quote_ident(name))
                .map(|name| format!("walcast_row.{name} is not distinct from walcast_key.{name}"));
            let same: Vec<String> = same.collect();
            let same = if same.is_empty() { "true".to_owned() } else { same.join(" and ") };
            format!("{table} as walcast_row cross join {given} as walcast_key where {same} limit 1")
        }
    };
    let sql = format!("select array[{}]::text[] from {from}", cells.join(", "));
    let json = Value::Object(named.clone()).to_string();
    let service: Map<String, Value> =
        [("role".to_owned(), json!("service_role")), ("exp".to_owned(), json!(0))].into_iter().collect();
    let service = Claims::verified(service)
        .map_err(|error| ExplainError::Database(PgError::Unexpected { doing: DOING, what: error.to_string() }))?;
    let mut scope = Envelope::new(&service, ASK_TIMEOUT).open(&core.pool, DOING).await.map_err(ExplainError::Database)?;
    let params: &[(&(dyn ToSql + Sync), Type)] = &[(&json, Type::TEXT)];
    let rows = scope.client().query_typed(&sql, params).await.map_err(PgError::when(DOING)).map_err(ExplainError::Row)?;
    const IDENTITY: &str = "select c.relreplident::text, coalesce((select array_agg(a.attname::text) from pg_catalog.pg_index i \
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey::int2[]) where i.indrelid = c.oid \
        and case c.relreplident when 'i' then i.indisreplident else i.indisprimary end), '{}') \
        from pg_catalog.pg_class c where c.oid = $1::int8::oid";
    let oid = i64::from(rules.table.0);
    let params: &[(&(dyn ToSql + Sync), Type)] = &[(&oid, Type::INT8)];
    let identity =
        scope.client().query_typed(IDENTITY, params).await.map_err(PgError::when(DOING)).map_err(ExplainError::Database)?;
    scope.end(DOING).await.map_err(ExplainError::Database)?;
    let row = rows.first().ok_or_else(|| ExplainError::NoRow(rules.name.clone()))?;
    let (identity, keys): (&str, Vec<String>) = identity.first().map_or(("n", Vec::new()), |row| (row.get(0), row.get(1)));
    let identity = match identity {
        "f" => ReplicaIdentity::Full,
        "i" => ReplicaIdentity::Index,
        "n" => ReplicaIdentity::Nothing,
        _ => ReplicaIdentity::Default,
    };
    let column = |column: &walcast_auth::ColumnRule| Column {
        name: column.name.as_str().into(),
        type_oid: column.type_oid,
        type_name: column.sql_type.as_str().into(),
        kind: ValueKind::Text,
        key: identity == ReplicaIdentity::Full || (identity != ReplicaIdentity::Nothing && keys.contains(&column.name)),
        tagged: false,
    };
    let described =
        Table { id: rules.table, name: rules.name.clone(), identity, columns: rules.columns.iter().map(column).collect() };
    let cells = row.get::<_, Vec<Option<String>>>(0).into_iter();
    Ok((Arc::new(described), Row(cells.map(|text| text.map_or(Cell::Null, |text| Cell::Value(text.into()))).collect())))
}

/// Which way decides, and why not in memory.
async fn way(
    core: &Core,
    rules: &Rules,
    claims: &Claims,
    commit: &Remembered,
    table: &Table,
    row: &Row,
) -> (&'static str, Option<String>) {
    let RowRule::Ask(question) = &rules.rows else { return ("by privileges alone", None) };
    let mut why_not = why_not_compiled(question, rules);
    if let Some(policy) = &question.policy {
        match policy.binder.bound(&core.pool, std::slice::from_ref(claims), ASK_TIMEOUT).await.as_deref() {
            Ok([Some(values)]) => match policy.with(values.clone()).decide(table, row) {
                Answer::Ask => why_not = Some("values of these types or collations are not compared here".into()),
                Answer::Allow | Answer::Deny | Answer::Lacking => return ("in memory", None),
            },
            _ => why_not = Some("PostgreSQL refuses to evaluate the policy for these claims".into()),
        }
    }
    let bound = match &question.set {
        Some(form) => {
            form.binder.bound(&core.pool, std::slice::from_ref(claims), ASK_TIMEOUT).await.ok().and_then(|mut all| all.pop()?)
        }
        None => None,
    };
    let many = bound.is_some();
    let who = bound.map_or(remembered::Who::Exact(claims.exact()), remembered::Who::Values);
    if ask::remembers_now(core, rules, question, who, (table, row), commit.commit.lsn) {
        return ("from a remembered answer of PostgreSQL", why_not);
    }
    (if many { "by PostgreSQL, for many callers at once" } else { "by PostgreSQL, for each caller" }, why_not)
}

fn why_not_compiled(question: &Question, rules: &Rules) -> Option<String> {
    if question.policy.is_some() {
        return None;
    }
    Some(if let Some(unheard) = &question.unheard {
        format!("it reads {unheard}, whose changes are not streamed: add it to the cache's publication with `walcast migrate`")
    } else if question.reads_anything {
        "it reaches a function, view, operator or domain that cannot be looked into, or its own table".into()
    } else if !question.reads.is_empty() {
        "it reads other tables".into()
    } else {
        let beyond = |policy: &&PolicyText| Policy::compile(std::slice::from_ref(&policy.using), &[], &rules.columns).is_none();
        let names: Vec<String> = question.policies.iter().filter(beyond).map(|policy| format!("`{}`", policy.name)).collect();
        let filter = if names.is_empty() { "the publication's row filter".to_owned() } else { names.join(", ") };
        format!("{filter} holds more than comparisons of text, uuid, integer and boolean columns with what the claims say")
    })
}

/// Each by itself: true, false, null, or the error that it ends in.
async fn policies(core: &Core, rules: &Rules, claims: &Claims, table: &Table, row: &Row) -> Vec<Value> {
    let RowRule::Ask(question) = &rules.rows else { return Vec::new() };
    let mut all = Vec::new();
    for policy in &question.policies {
        let mut document = json!({
            "name": policy.name, "kind": if policy.permissive { "permissive" } else { "restrictive" }, "using": policy.using,
        });
        match evaluated(core, rules, claims, &policy.using, table, row).await {
            Ok(answer) => document["answer"] = json!(answer),
            Err(error) => document["error"] = json!(error.to_string()),
        }
        all.push(document);
    }
    all
}

async fn evaluated(
    core: &Core,
    rules: &Rules,
    claims: &Claims,
    text: &str,
    table: &Table,
    row: &Row,
) -> Result<Option<bool>, PgError> {
    let mut answers = [false; 2];
    for (answer, expression) in answers.iter_mut().zip([format!("({text})"), format!("(({text}) is null)")]) {
        let question = Question::of_row(expression, Vec::new());
        let asking = Asking { claims, images: vec![(table, row)], nonce: core.next_nonce() };
        let verdicts = row_visibility::ask(&core.pool, rules, &question, &asking, ASK_TIMEOUT).await?;
        *answer = verdicts.allowed.first().copied().unwrap_or(false);
    }
    let [holds, is_null] = answers;
    Ok((!is_null).then_some(holds))
}

fn reads(question: &Question) -> Value {
    json!({
        "tables": question.reads.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "not_published": question.unheard.as_ref().map(ToString::to_string),
        "anything": question.reads_anything,
        "columns": question.needs,
    })
}

/// As far as the caller's columns go.
fn as_json(table: &Table, row: &Row, rules: &Rules) -> Value {
    let visible = rules.visible(table);
    let cells = table.columns.iter().zip(&row.0).zip(visible).filter(|(_, visible)| *visible);
    cells.map(|((column, cell), _)| (column.name.to_string(), json!(cell.text()))).collect::<Map<String, Value>>().into()
}

fn told(verdict: &Verdict) -> (&'static str, Option<&'static str>) {
    match verdict {
        Verdict::Show { .. } => ("the change", None),
        Verdict::Hide => ("nothing", None),
        Verdict::Error { error, .. } => ("that there is a change, without its values", Some(*error)),
        Verdict::Unsure(reason) => ("to read again", Some(*reason)),
    }
}

fn why(rules: &Rules, verdict: &Verdict, policies: &[Value]) -> String {
    let of = |kind: &str, answer: bool| -> Vec<&str> {
        let fits = |policy: &&Value| policy["kind"] == kind && (policy["answer"] == true) == answer;
        policies.iter().filter(fits).filter_map(|policy| policy["name"].as_str()).collect()
    };
    if let Verdict::Unsure(reason) = verdict {
        return format!("it cannot be told: {reason}");
    }
    if rules.published.is_none() {
        return "the table is not in the publication for clients: alter publication … add table".into();
    }
    if !rules.readable || !rules.columns.iter().any(|column| column.visible) {
        return "the role may read no published column of the table: grant usage on its schema and select on it".into();
    }
    match (&rules.rows, verdict) {
        (RowRule::All, _) => "row security does not apply to this role".into(),
        (RowRule::Nobody, _) => "row security is on, and no permissive policy for SELECT is for this role".into(),
        (_, Verdict::Show { .. } | Verdict::Error { .. }) => format!("admitted by {}", of("permissive", true).join(", ")),
        _ => {
            let (admits, forbids) = (of("permissive", true), of("restrictive", false));
            if admits.is_empty() {
                "no permissive policy admits the row for these claims".into()
            } else if forbids.is_empty() {
                "the publication's row filter leaves the row out, or a policy fails".into()
            } else {
                format!("forbidden by {}", forbids.join(", "))
            }
        }
    }
}
