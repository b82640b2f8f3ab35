//! Which functions a query reaches, and what each means for keeping its answer.
//!
//! Called by the planner with every text involved: the query, views, policies, the plan. A name before a parenthesis
//! counts as called; one that is both PostgreSQL's and somebody else's counts as somebody else's.

use std::collections::HashSet;

use tokio_postgres::{Client, types::Type};

use crate::lex::{Token, lex, names_called};

/// What functions make of an answer. The first of each kind is kept, for the message.
#[derive(Debug, Default)]
pub(crate) struct Reached {
    pub opaque: Option<String>,
    pub volatile: Option<String>,
    pub clock: Option<String>,
    /// A function that reads tables was unfolded into the plan: only the plan knows them.
    pub unfolded: bool,
    /// It may read who asks: claims, role, privileges, or something that cannot be looked into.
    pub asker: bool,
}

/// Ours: they read the claims, which are part of every key.
const CLAIMS: [(&str, &str); 5] = [("auth", "uid"), ("auth", "jwt"), ("auth", "role"), ("auth", "email"), ("realtime", "topic")];
const CLOCK_WORDS: [&str; 5] = ["current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"];
const ASKER_WORDS: [&str; 6] = ["current_user", "current_role", "session_user", "system_user", "user", "current_setting"];
/// Stable, and the same for whoever asks.
const SAME_FOR_ALL: [&str; 5] = ["now", "transaction_timestamp", "statement_timestamp", "age", "clock_timestamp"];
const CLOCK_LITERALS: [&str; 4] = ["now", "today", "tomorrow", "yesterday"];
/// Stable, but only because of settings that are the same for all our queries, or of the role, which is in the key.
const SETTLED: [&str; 66] = [
    "anytextcat",
    "array_to_json",
    "array_to_string",
    "concat",
    "concat_ws",
    "convert",
    "convert_from",
    "convert_to",
    "current_database",
    "current_schema",
    "current_user",
    "date",
    "date_part",
    "date_trunc",
    "enum_first",
    "enum_last",
    "enum_range",
    "extract",
    "format",
    "format_type",
    "generate_series",
    "getdatabaseencoding",
    "in_range",
    "json_agg",
    "json_build_array",
    "json_build_object",
    "json_object_agg",
    "json_populate_record",
    "json_populate_recordset",
    "json_to_record",
    "json_to_recordset",
    "jsonb_agg",
    "jsonb_build_array",
    "jsonb_build_object",
    "jsonb_object_agg",
    "jsonb_populate_record",
    "jsonb_populate_recordset",
    "jsonb_to_record",
    "jsonb_to_recordset",
    "json_to_tsvector",
    "jsonb_to_tsvector",
    "length",
    "make_timestamptz",
    "money",
    "numeric",
    "overlaps",
    "phraseto_tsquery",
    "plainto_tsquery",
    "quote_literal",
    "quote_nullable",
    "row_to_json",
    "session_user",
    "textanycat",
    "time",
    "timestamp",
    "timestamptz",
    "timetz",
    "timezone",
    "to_char",
    "to_date",
    "to_json",
    "to_jsonb",
    "to_number",
    "to_timestamp",
    "to_tsquery",
    "to_tsvector",
];
const SETTLED_PREFIXES: [&str; 6] =
    ["jsonb_path_", "websearch_to_", "ts_headline", "json_agg_", "jsonb_agg_", "json_object_agg_"];
/// They read whole tables by name.
const READS_TABLES: [&str; 9] = [
    "table_to_xml",
    "table_to_xml_and_xmlschema",
    "schema_to_xml",
    "schema_to_xml_and_xmlschema",
    "database_to_xml",
    "database_to_xml_and_xmlschema",
    "query_to_xml",
    "cursor_to_xml",
    "ts_stat",
];

const FUNCTIONS: &str = "
select n.nspname::text, p.proname::text, p.provolatile::text, l.lanname::text,
       p.prosecdef or p.proconfig is not null or p.prokind <> 'f', p.proretset,
       coalesce(pg_catalog.pg_get_function_sqlbody(p.oid), p.prosrc), p.oid >= 16384
from unnest($1::text[], $2::text[]) as x(schema, name)
join pg_catalog.pg_proc p on p.proname = x.name
join pg_catalog.pg_namespace n on n.oid = p.pronamespace
join pg_catalog.pg_language l on l.oid = p.prolang
where case when x.schema is null then n.nspname in ('pg_catalog', 'public', 'extensions') else n.nspname = x.schema end";

/// Functions behind operators and casts that promise neither to be compiled code nor to depend on nothing but their arguments.
const HIDDEN: &str = "
select o.oprname::text from pg_catalog.pg_operator o
join pg_catalog.pg_proc p on p.oid = o.oprcode join pg_catalog.pg_language l on l.oid = p.prolang
where o.oid >= 16384 and p.provolatile <> 'i' and l.lanname not in ('c', 'internal')
union all
select '::' || c.casttarget::pg_catalog.regtype::text from pg_catalog.pg_cast c
join pg_catalog.pg_proc p on p.oid = c.castfunc join pg_catalog.pg_language l on l.oid = p.prolang
where c.oid >= 16384 and p.provolatile <> 'i' and l.lanname not in ('c', 'internal')";

pub(crate) async fn reached(client: &Client, texts: &[String], plan: &[String]) -> Result<Reached, tokio_postgres::Error> {
    let mut reached = Reached::default();
    let mut waiting: Vec<(Option<String>, String)> = Vec::new();
    let mut planned: HashSet<String> = HashSet::new();
    for text in texts {
        let tokens = lex(text);
        clock(&tokens, &mut reached);
        waiting.extend(names_called(&tokens));
    }
    for text in plan {
        let tokens = lex(text);
        clock(&tokens, &mut reached);
        let names = names_called(&tokens);
        planned.extend(names.iter().map(|(_, name)| name.clone()));
        waiting.extend(names);
    }
    let mut seen: HashSet<(Option<String>, String)> = HashSet::new();
    while !waiting.is_empty() {
        let names: Vec<_> = waiting.drain(..).filter(|name| seen.insert(name.clone())).collect();
        let (schemas, called): (Vec<Option<String>>, Vec<String>) = names.into_iter().unzip();
        let rows = client.query_typed(FUNCTIONS, &[(&schemas, Type::TEXT_ARRAY), (&called, Type::TEXT_ARRAY)]).await?;
        for row in rows {
            let function = Function {
                schema: row.get(0),
                name: row.get(1),
                volatility: row.get(2),
                language: row.get(3),
                closed: row.get(4),
                returns_set: row.get(5),
                body: row.get(6),
                foreign: row.get(7),
            };
            waiting.extend(function.judge(&planned, texts, plan, &mut reached));
        }
    }
    for row in client.query_typed(HIDDEN, &[]).await? {
        let name: String = row.get(0);
        if name.starts_with("::") || texts.iter().chain(plan).any(|text| text.contains(&name)) {
            reached.opaque.get_or_insert(name);
            reached.asker = true;
        }
    }
    Ok(reached)
}

fn clock(tokens: &[Token], reached: &mut Reached) {
    for token in tokens {
        let found = match token {
            Token::Word { text, quoted: false } => CLOCK_WORDS.contains(&text.as_str()).then_some(text),
            Token::Literal(text) => reads_clock(text).then_some(text),
            _ => None,
        };
        if let Some(name) = found {
            reached.clock.get_or_insert_with(|| name.clone());
        }
        reached.asker |= ASKER_WORDS.iter().any(|word| token.is_word(word));
    }
}

/// `'now'`, `'today 12:00'`: as a date or time they mean another moment each time.
pub(crate) fn reads_clock(literal: &str) -> bool {
    let words = literal.split(|c: char| !c.is_alphabetic());
    literal.len() < 64 && words.into_iter().any(|word| CLOCK_LITERALS.contains(&word.to_ascii_lowercase().as_str()))
}

struct Function {
    schema: String,
    name: String,
    volatility: String,
    language: String,
    /// Runs as its owner, changes settings, or is an aggregate or window function: never unfolded.
    closed: bool,
    returns_set: bool,
    body: String,
    foreign: bool,
}

impl Function {
    /// The names that its body calls, if that is all there is to it.
    fn judge(
        &self,
        planned: &HashSet<String>,
        texts: &[String],
        plan: &[String],
        reached: &mut Reached,
    ) -> Vec<(Option<String>, String)> {
        let (schema, name) = (self.schema.as_str(), self.name.as_str());
        if CLAIMS.contains(&(schema, name)) {
            reached.asker = true;
            return Vec::new();
        }
        if schema == "pg_catalog" && !self.foreign {
            self.judge_builtin(texts, plan, reached);
            return Vec::new();
        }
        let full = format!("{schema}.{name}()");
        let body = lex(&self.body);
        let count = |word: &str| body.iter().filter(|token| token.is_word(word)).count();
        // PostgreSQL unfolds a scalar SQL function only if it is one expression; in FROM, any single SELECT.
        let expression = count("from") == 0 && count("select") <= 1 && count("with") == 0 && count("table") == 0;
        let unfolded = self.language == "sql" && !self.closed && self.volatility != "v" && !planned.contains(name);
        if !unfolded || !(self.returns_set || expression) {
            reached.opaque.get_or_insert(full);
            reached.asker = true;
            return Vec::new();
        }
        clock(&body, reached);
        reached.unfolded |= !expression;
        names_called(&body)
    }

    fn judge_builtin(&self, texts: &[String], plan: &[String], reached: &mut Reached) {
        let name = self.name.as_str();
        let settled = SETTLED.contains(&name) || SETTLED_PREFIXES.iter().any(|p| name.starts_with(p));
        reached.asker |= matches!(name, "current_user" | "session_user" | "current_setting")
            || (self.volatility != "i" && !settled && !SAME_FOR_ALL.contains(&name));
        if READS_TABLES.contains(&name) {
            reached.opaque.get_or_insert_with(|| format!("{name}()"));
        } else if self.volatility == "v" {
            reached.volatile.get_or_insert_with(|| format!("{name}()"));
        } else if name == "current_setting" {
            // Claims are part of the key; other settings may change without a commit.
            if !texts.iter().chain(plan).all(|text| reads_only_requests(text)) {
                reached.clock.get_or_insert_with(|| "current_setting()".into());
            }
        } else if self.volatility == "s" && !settled {
            reached.clock.get_or_insert_with(|| format!("{name}()"));
        }
    }
}

fn reads_only_requests(text: &str) -> bool {
    let tokens = lex(text);
    tokens.iter().enumerate().filter(|(_, token)| token.is_word("current_setting")).all(|(index, _)| {
        tokens.get(index + 1) == Some(&Token::Symbol('('))
            && matches!(tokens.get(index + 2), Some(Token::Literal(name)) if name.to_ascii_lowercase().starts_with("request."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_mean_another_moment_each_time() {
        for text in ["now", " Today ", "today 12:00", "yesterday allballs"] {
            assert!(reads_clock(text), "{text}");
        }
        assert!(!reads_clock("2026-01-01") && !reads_clock("nowhere"));
        assert!(reads_only_requests("current_setting('request.jwt.claims', true)"));
        assert!(!reads_only_requests("current_setting('app.id')") && !reads_only_requests("current_setting($1)"));
    }
}
