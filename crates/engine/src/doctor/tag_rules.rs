//! Holds the config's rules for tags against the database: what is wrong with one, what would make one more precise, and
//! what all of them mean here. Asked by `check`, by every start, and whenever the catalog moved. Never changes anything.

use std::collections::{HashMap, HashSet};

use tokio_postgres::{Client, types::Type};
use walcast_matcher::{EventMask, Image, Reference, TagRule, Template};
use walcast_model::{Claims, Operation, TableId, TableName, Tag};
use walcast_pg::{Catalog, PgError, Pool, quote_ident};
use walcast_query::{NamedQuery, QueryError, Uncacheable, lookup_of_many, plan};

use super::Finding;
use crate::{
    config::TagRuleConfig,
    pipeline::cascade::ROWS,
    tag_rules::{Lookup, Resolved},
};

const CHECK: &str = "tag_rules";
const DOING: &str = "reading what tag rules need";

pub(crate) struct Examined {
    pub findings: Vec<Finding>,
    /// Complete if no finding fails.
    pub resolved: Resolved,
}

/// What the catalog says of a rule's table.
struct Facts {
    id: TableId,
    /// In the stream.
    columns: Vec<String>,
    /// Columns of an old row; none: all of them.
    identity: Option<Vec<String>>,
}

struct Examiner<'a> {
    client: &'a Client,
    pool: &'a Pool,
    publication: &'a str,
    published: HashSet<TableName>,
    role: String,
}

/// A rule that holds, and the tables that its lookup reads.
struct Good {
    rule: TagRule,
    lookup: Option<Lookup>,
    reads: Vec<TableName>,
    warning: Option<Finding>,
}

/// A rule's index, and a table that its lookup reads.
type Read = (usize, TableName);

pub(crate) async fn examine(
    client: &Client,
    pool: &Pool,
    configured: &[TagRuleConfig],
    publication: &str,
) -> Result<Examined, PgError> {
    let mut examined = Examined { findings: Vec::new(), resolved: Resolved::default() };
    if configured.is_empty() {
        return Ok(examined);
    }
    let sql = "select schemaname::text, tablename::text from pg_catalog.pg_publication_tables where pubname = $1";
    let rows = client.query_typed(sql, &[(&publication, Type::TEXT)]).await.map_err(PgError::when(DOING))?;
    let published = rows.iter().map(|row| TableName::new(row.get(0), row.get(1))).collect();
    let rows = client.query_typed("select current_user::text", &[]).await.map_err(PgError::when(DOING))?;
    let role = rows.first().map(|row| row.get(0)).unwrap_or_default();
    let examiner = Examiner { client, pool, publication, published, role };
    let mut good = Vec::new();
    for config in configured {
        match examiner.rule(config).await? {
            Ok(rule) => good.push(rule),
            Err(finding) => examined.findings.push(finding),
        }
    }
    if good.len() < configured.len() {
        return Ok(examined);
    }
    examined.findings.extend(good.iter().filter_map(|good| good.warning.clone()));
    let (moving, unsure) = whose_changes_move_lookups(&good);
    for (index, table) in &moving {
        let words: Vec<&str> = good[*index].rule.raise.iter().map(Template::word).collect();
        let line = format!(
            "{}: its lookup reads {table}, and no rule says what a change there raises: each one lets all `{}:…` fall",
            configured[*index].place,
            words.join(":…` and `")
        );
        let fix = format!(
            "[[tags]]\ntable = {:?}\nraise = [{:?}]   # from the columns of {table}, in the new and in the old row",
            shown(table),
            good[*index].rule.raise.first().map(Template::as_str).unwrap_or_default()
        );
        examined.findings.push(Finding::warn(CHECK, line, fix));
    }
    if examined.findings.is_empty() {
        let (count, tables) = (configured.len(), configured.iter().map(|rule| &rule.table).collect::<HashSet<_>>().len());
        examined.findings.push(Finding::ok(CHECK, format!("{count} rules for tags hold, over {tables} tables")));
    }
    let templates: Vec<(TableName, Template)> = moving
        .iter()
        .flat_map(|(index, table)| good[*index].rule.raise.iter().map(|template| (table.clone(), template.clone())))
        .collect();
    let mut rules = Vec::new();
    for (index, good) in good.into_iter().enumerate() {
        if let Some(mut lookup) = good.lookup {
            lookup.unsure_after =
                unsure.iter().filter(|(of, _)| *of == index).map(|(_, table)| Tag::table(table).hash()).collect();
            examined.resolved.lookups.insert(index, lookup);
        }
        rules.push(good.rule);
    }
    let moving = templates.iter().map(|(table, template)| (table, template));
    examined.resolved.rules = walcast_matcher::TagRules::new(rules, moving);
    Ok(examined)
}

/// A change of a table that a lookup reads moves what it answers, and with it entries that the lookup no longer leads to.
/// Such a change must raise the same words itself: by a plain rule, at once; by a cascade, a little later; else all fall.
fn whose_changes_move_lookups(good: &[Good]) -> (Vec<Read>, Vec<Read>) {
    let (mut moving, mut unsure) = (Vec::new(), Vec::new());
    for (index, rule) in good.iter().enumerate() {
        for table in &rule.reads {
            let raises = |other: &TagRule, word: &str| {
                let whole = |template: &&Template| template.columns().all(|column| column.image == Image::Either);
                other.table == *table
                    && other.on == EventMask::ALL
                    && other.raise.iter().filter(whole).any(|template| template.word() == word)
            };
            let covered = |cascades: bool| {
                rule.rule.raise.iter().all(|template| {
                    let others = good.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, good)| &good.rule);
                    others.filter(|other| cascades || other.keys.is_none()).any(|other| raises(other, template.word()))
                })
            };
            if covered(false) {
                continue;
            }
            if covered(true) { &mut unsure } else { &mut moving }.push((index, table.clone()));
        }
    }
    (moving, unsure)
}

impl Examiner<'_> {
    async fn rule(&self, config: &TagRuleConfig) -> Result<Result<Good, Finding>, PgError> {
        let failed = |what: String, fix: String| Finding::fail(CHECK, format!("{}: {what}", config.place), fix);
        let mut raise = Vec::new();
        for text in &config.raise {
            match Template::parse(text) {
                Ok(template) => raise.push(template),
                Err(error) => return Ok(Err(failed(error.to_string(), "raise = [\"student:{student_id}\"]".into()))),
            }
        }
        let facts = match self.table(&config.table).await? {
            Ok(facts) => facts,
            Err((what, fix)) => return Ok(Err(failed(what, fix))),
        };
        let with: Vec<Reference> = config.with.iter().map(|text| Reference::parse(text)).collect();
        let of_row = |lookup: &[String]| -> Vec<Reference> {
            let mut of_row: Vec<Reference> = Vec::new();
            for column in raise.iter().flat_map(Template::columns) {
                let of_lookup = column.image == Image::Either && lookup.iter().any(|name| **name == *column.column);
                if !of_lookup && !of_row.contains(column) {
                    of_row.push(column.clone());
                }
            }
            of_row
        };
        let (mut lookup, mut reads, mut offered) = (None, Vec::new(), String::new());
        if let Some(sql) = &config.cascade {
            match self.lookup(config, sql).await? {
                Ok((made, read)) => {
                    let of_row = of_row(&made.columns);
                    offered = format!("; its lookup gives {}", made.columns.join(", "));
                    let columns =
                        made.columns.iter().filter(|name| raise.iter().flat_map(Template::columns).any(|c| *c.column == ***name));
                    let columns = columns.cloned().collect::<Vec<_>>();
                    let sql = lookup_of_many(&made.sql, &made.types, &columns, ROWS + 1);
                    if let Err(error) = self.prepares(&sql).await? {
                        return Ok(Err(failed(
                            format!("its lookup cannot be asked for many rows at once: {error}"),
                            LOOKUP_FIX.into(),
                        )));
                    }
                    let place = config.place.clone();
                    let (raise, claims, unsure_after) = (raise.clone(), self.claims()?, Vec::new());
                    lookup = Some(Lookup { place, sql, params: made.types.len(), of_row, columns, raise, claims, unsure_after });
                    reads = read;
                }
                Err((what, fix)) => return Ok(Err(failed(what, fix))),
            }
        }
        let own: Vec<Reference> = lookup.as_ref().map_or_else(|| of_row(&[]), |lookup| lookup.of_row.clone());
        let changed = config.when_changed.iter().map(|name| Reference { image: Image::Either, column: name.as_str().into() });
        let needed: Vec<Reference> = own.iter().chain(&with).cloned().chain(changed).collect();
        if let Some(missing) = needed.iter().find(|column| !facts.columns.iter().any(|name| **name == *column.column)) {
            let has = facts.columns.join(", ");
            let fix = format!("{} has {has}{offered}; generated columns are not in the stream", config.table);
            return Ok(Err(failed(format!("{} has no column `{}` in the stream", config.table, missing.column), fix)));
        }
        let warning = imprecise(config, &facts, &needed);
        let keys = lookup.as_ref().map(|lookup| with.iter().chain(&lookup.of_row).cloned().collect());
        let when_changed = config.when_changed.iter().map(|name| name.as_str().into()).collect();
        let rule = TagRule { table: config.table.clone(), id: facts.id, on: config.on, when_changed, raise, keys };
        Ok(Ok(Good { rule, lookup, reads, warning }))
    }

    async fn table(&self, name: &TableName) -> Result<Result<Facts, (String, String)>, PgError> {
        let catalog = Catalog::new(self.pool.clone());
        let Some(id) = catalog.table_id(name).await? else {
            let fix = "write it as the database does, `schema.table` outside public; or make it first".to_owned();
            return Ok(Err((format!("there is no table {name}"), fix)));
        };
        if !self.published.contains(name) {
            return Ok(Err(self.unpublished(name)));
        }
        let columns = catalog.table(id).await?.map(|facts| facts.columns).unwrap_or_default();
        let columns = columns.into_iter().filter(|column| !column.generated).map(|column| column.name).collect();
        let sql = "select (c.relreplident = 'f' or c.relkind = 'p') and not exists (select from pg_catalog.pg_partition_tree(c.oid) leaf \
                     join pg_catalog.pg_class k on k.oid = leaf.relid where leaf.isleaf and k.relreplident <> 'f'), \
                   array(select a.attname::text from pg_catalog.pg_index i join pg_catalog.pg_attribute a on a.attrelid = i.indrelid \
                     and a.attnum = any (i.indkey::int2[]) where i.indrelid = c.oid \
                     and case c.relreplident when 'i' then i.indisreplident else i.indisprimary end) \
                   from pg_catalog.pg_class c where c.oid = $1::int8::oid";
        let oid = i64::from(id.0);
        let rows = self.client.query_typed(sql, &[(&oid, Type::INT8)]).await.map_err(PgError::when(DOING))?;
        let identity = rows.first().and_then(|row| (!row.get::<_, bool>(0)).then(|| row.get(1)));
        Ok(Ok(Facts { id, columns, identity }))
    }

    fn unpublished(&self, table: &TableName) -> (String, String) {
        let publication = quote_ident(self.publication);
        let sql = format!("alter publication {publication} add table only {};", quoted(table));
        (
            format!("{table} is not in publication {}, so its changes are not heard", self.publication),
            format!("walcast migrate\n-- or: {sql}"),
        )
    }

    /// What the lookup is, and the tables that it reads.
    async fn lookup(
        &self,
        config: &TagRuleConfig,
        sql: &str,
    ) -> Result<Result<(Written, Vec<TableName>), (String, String)>, PgError> {
        let wrong = |what: String, fix: &str| Ok(Err((what, fix.to_owned())));
        let sql = sql.trim().trim_end_matches(';').trim_end();
        let (types, columns) = match self.describe(sql).await? {
            Ok(described) => described,
            Err(error) => return wrong(format!("its lookup is refused: {error}"), LOOKUP_FIX),
        };
        if types.len() != config.with.len() || types.is_empty() {
            let what = format!("its lookup has {} parameters, and `with` names {} columns", types.len(), config.with.len());
            return wrong(what, "with = [\"module_id\"] gives $1, and so on in order");
        }
        let mut text = String::from("-- name: tag_rule\n");
        types.iter().enumerate().for_each(|(index, name)| text.push_str(&format!("-- param: p{} {name}\n", index + 1)));
        if !config.reads.is_empty() {
            let reads: Vec<String> = config.reads.iter().map(shown).collect();
            text.push_str(&format!("-- depends: {}\n", reads.join(", ")));
        }
        // Its parameters are numbers and names alike.
        let query = match NamedQuery::parse("", &format!("{text}{sql}")) {
            Ok(query) => query,
            Err(error) => return wrong(format!("its lookup cannot be read: {}", error.what), &error.hint),
        };
        let plan = match plan(self.pool, &query, &self.role, std::time::Duration::from_secs(10), self.publication).await {
            Ok(plan) => plan,
            Err(QueryError::Denied { message, .. }) => {
                let denied = message.rsplit(' ').next().unwrap_or_default();
                let role = quote_ident(&self.role);
                let grant = match message.contains("schema") {
                    true => format!("grant usage on schema {denied} to {role};"),
                    false if message.contains("function") => format!("grant execute on function {denied} to {role};"),
                    false => format!("grant select on {denied} to {role};"),
                };
                return wrong(format!("{} may not run its lookup: {message}", self.role), &grant);
            }
            Err(QueryError::Database(error)) => return Err(error),
            Err(error) => return wrong(format!("its lookup is refused: {error}"), &error.hint()),
        };
        match &plan.cacheable {
            Err(Uncacheable::Opaque(function)) => {
                let what = format!("its lookup calls `{function}`, which cannot be looked into");
                return wrong(what, "reads = [\"modules\"] says which tables it reads");
            }
            Err(Uncacheable::Unpublished { .. }) | Ok(()) => {}
            Err(other) => return wrong(format!("its lookup answers otherwise without a commit: {other}"), LOOKUP_FIX),
        }
        let mut reads: Vec<TableName> = plan.dependencies.iter().map(|dependency| dependency.table.clone()).collect();
        reads.sort();
        reads.dedup();
        if let Some(table) = reads.iter().find(|table| !self.published.contains(table)) {
            let (what, fix) = self.unpublished(table);
            return Ok(Err((format!("its lookup reads a table that is not heard: {what}"), fix)));
        }
        Ok(Ok((Written { sql: sql.to_owned(), types, columns }, reads)))
    }

    /// Types of the parameters and names of the columns, or why PostgreSQL refuses it.
    async fn describe(&self, sql: &str) -> Result<Result<(Vec<String>, Vec<String>), String>, PgError> {
        let statement = match self.prepared(sql).await? {
            Ok(statement) => statement,
            Err(error) => return Ok(Err(error)),
        };
        let oids: Vec<i64> = statement.params().iter().map(|param| i64::from(param.oid())).collect();
        let names =
            "select pg_catalog.format_type(x.oid::oid, null) from unnest($1::int8[]) with ordinality as x(oid, n) order by n";
        let rows = self.client.query_typed(names, &[(&oids, Type::INT8_ARRAY)]).await.map_err(PgError::when(DOING))?;
        let columns = statement.columns().iter().map(|column| column.name().to_owned()).collect();
        Ok(Ok((rows.iter().map(|row| row.get(0)).collect(), columns)))
    }

    async fn prepares(&self, sql: &str) -> Result<Result<(), String>, PgError> {
        Ok(self.prepared(sql).await?.map(drop))
    }

    /// As it will be asked: read only, row security off, our search path. Executes nothing.
    async fn prepared(&self, sql: &str) -> Result<Result<tokio_postgres::Statement, String>, PgError> {
        let begin = "begin read only; set local search_path = public, extensions; set local row_security = off";
        self.client.batch_execute(begin).await.map_err(PgError::when(DOING))?;
        let prepared = self.client.prepare(sql).await;
        self.client.batch_execute("rollback").await.map_err(PgError::when(DOING))?;
        match prepared {
            Ok(statement) => Ok(Ok(statement)),
            Err(error) => match PgError::from_driver(DOING, error) {
                PgError::Refused { message, .. } => Ok(Err(message)),
                other => Err(other),
            },
        }
    }

    fn claims(&self) -> Result<Claims, PgError> {
        let serde_json::Value::Object(map) = serde_json::json!({ "role": self.role, "exp": 0 }) else {
            unreachable!("written as an object above")
        };
        Claims::verified(map).map_err(|error| PgError::Unexpected { doing: DOING, what: error.to_string() })
    }
}

const LOOKUP_FIX: &str = "cascade = \"select product_id from modules where id = $1\": one SELECT over published tables. Where row security is \
                          in its way, let it call a SECURITY DEFINER function that we may execute, and name the tables with `reads`";

/// A lookup that PostgreSQL takes.
struct Written {
    sql: String,
    types: Vec<String>,
    columns: Vec<String>,
}

/// Old values that the stream will not have.
fn imprecise(config: &TagRuleConfig, facts: &Facts, needed: &[Reference]) -> Option<Finding> {
    let identity = facts.identity.as_ref()?;
    if !config.on.has(Operation::Update) && !config.on.has(Operation::Delete) {
        return None;
    }
    let lacking =
        needed.iter().filter(|column| column.image != Image::New && !identity.iter().any(|key| **key == *column.column));
    let mut lacking: Vec<&str> = lacking.map(|column| &*column.column).collect();
    lacking.sort_unstable();
    lacking.dedup();
    if lacking.is_empty() {
        return None;
    }
    let words: HashMap<&str, ()> = config.raise.iter().filter_map(|text| text.split(':').next()).map(|word| (word, ())).collect();
    let words: Vec<&str> = words.into_keys().collect();
    let line = format!(
        "{}: updates and deletes of {} do not say what {} was, so they let all `{}:…` fall",
        config.place,
        config.table,
        lacking.join(", "),
        words.join(":…` and `")
    );
    Some(Finding::warn(CHECK, line, format!("alter table {} replica identity full;", quoted(&config.table))))
}

/// As the config writes it.
fn shown(table: &TableName) -> String {
    if table.schema() == "public" { table.table().to_owned() } else { format!("{}.{}", table.schema(), table.table()) }
}

fn quoted(table: &TableName) -> String {
    format!("{}.{}", quote_ident(table.schema()), quote_ident(table.table()))
}
