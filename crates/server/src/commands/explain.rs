//! `walcast explain QUERY`: what an answer hangs on, for one caller and one set of parameters, and what would make it better.
//! Reads the files and the database; needs no running server and changes nothing.

use std::{collections::HashMap, path::Path, process::ExitCode};

use serde_json::{Map, Value, json};
use walcast_engine::{ConnectConfig, DeskError, Explanation, QueryDesk, model::Claims};

use crate::{cli::ExplainArgs, failure::Failure, settings::Settings};

pub async fn run(settings: Settings, args: ExplainArgs) -> Result<ExitCode, Failure> {
    walcast_engine::install_crypto();
    let desk = desk(&settings).await?.ok_or_else(|| {
        Failure::usage("no_queries", "no folder of queries is named")
            .hint("set queries.dir, or --queries.dir; those of `walcast dev` are in demo/queries".to_owned())
    })?;
    let params = pairs(&args.params, "param")?;
    let mut claims: Map<String, Value> = Map::new();
    for (name, text) in pairs(&args.claims, "claim")? {
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        claims.insert(name, value);
    }
    claims.insert("role".into(), args.role.clone().into());
    claims.insert("exp".into(), 0.into());
    let claims = Claims::verified(claims).map_err(|error| Failure::usage("claims", error.to_string()))?;
    let explained = desk.explain(&args.query, &claims, &params).await.map_err(failure)?;
    if args.json {
        println!("{:#}", document(&explained));
    } else {
        print!("{}", text(&explained));
    }
    Ok(ExitCode::SUCCESS)
}

/// None: no folder is named.
pub(super) async fn desk(settings: &Settings) -> Result<Option<QueryDesk>, Failure> {
    let Some(dir) = &settings.queries.dir else { return Ok(None) };
    let url = settings.database.url.as_ref().ok_or_else(|| {
        Failure::usage("no_database", "no database is named")
            .hint("set WALCAST_DATABASE_URL, as for serve; that of `walcast dev` is in its banner".to_owned())
    })?;
    let connect = ConnectConfig::parse(url.expose()).map_err(|error| Failure::usage("bad_database_url", error.to_string()))?;
    let namespaces: Vec<String> = settings.cache.namespaces.keys().cloned().collect();
    let database = &settings.database;
    let (timeout, publication) = (database.statement_timeout, &database.publication_cache);
    let roles = settings.auth.allowed_roles.clone();
    QueryDesk::open(&connect, Path::new(dir), timeout, publication, roles, &namespaces).await.map(Some).map_err(failure)
}

fn failure(error: DeskError) -> Failure {
    match error {
        DeskError::Files(text) => Failure::new("queries", text).hint("mend the files".to_owned()),
        DeskError::Database(text) => Failure::new("database", text).hint("`walcast check` looks what is wrong".to_owned()),
        DeskError::Query(error) => Failure::new(error.code(), error.to_string()).hint(error.hint()),
    }
}

fn pairs(list: &[String], what: &str) -> Result<HashMap<String, String>, Failure> {
    let pair =
        |text: &String| match text.split_once('=') {
            Some((name, value)) => Ok((name.trim().to_owned(), value.to_owned())),
            None => Err(Failure::usage("bad_argument", format!("`--{what} {text}` has no `=`"))
                .hint(format!("write --{what} name=value"))),
        };
    list.iter().map(pair).collect()
}

fn document(e: &Explanation) -> Value {
    let dependency = |(table, narrow): &(String, Option<(String, Vec<String>)>)| {
        let narrow = narrow.as_ref().map(|(column, values)| json!({ "column": column, "values": values }));
        json!({ "table": table, "narrowed_by": narrow })
    };
    json!({
        "query": e.name, "file": e.file, "role": e.role,
        "key": {
            "namespace": e.namespace, "key": e.key,
            "parts": e.key_parts.iter().map(|(name, value)| json!({ "part": name, "value": value })).collect::<Vec<_>>(),
        },
        "kept": e.not_kept.is_none(),
        "not_kept": e.not_kept.as_ref().map(|(code, why)| json!({ "code": code, "why": why })),
        "not_narrowed": e.not_narrowed,
        "same_for_everybody": e.for_anyone,
        "ttl_s": e.ttl.map(|ttl| ttl.as_secs()),
        "max_age_s": e.max_age.map(|age| age.as_secs()),
        "dependencies": e.dependencies.iter().map(dependency).collect::<Vec<_>>(),
        "tags": e.tags,
        "advice": e.advice.iter().map(|advice| json!({ "what": advice.what, "mend": advice.mend })).collect::<Vec<_>>(),
        "plan": e.plan,
    })
}

fn text(e: &Explanation) -> String {
    let mut text = format!("{} ({}) as {}\n", e.name, e.file, e.role);
    match &e.not_kept {
        None => {
            let ttl = e.ttl.map_or("as its namespace says".to_owned(), |ttl| format!("for {} s at most", ttl.as_secs()));
            text.push_str(&format!("\nkept      {ttl}, until a row behind it changes\n"));
        }
        Some((code, why)) => text.push_str(&format!("\nnot kept  {code}: {why}\n")),
    }
    if e.for_anyone {
        text.push_str("          the same for everybody who may run it as this role\n");
    }
    text.push_str("\ndepends on\n");
    for (table, narrow) in &e.dependencies {
        match narrow {
            None => text.push_str(&format!("  {table}, every row\n")),
            Some((column, values)) => text.push_str(&format!("  {table}, rows whose {column} is {}\n", values.join(" or "))),
        }
    }
    if let Some(why) = &e.not_narrowed {
        text.push_str(&format!("  not narrowed: {why}\n"));
    }
    text.push_str("\ntags\n");
    e.tags.iter().for_each(|tag| text.push_str(&format!("  {tag}\n")));
    text.push_str(&format!("\nkey in {}\n", e.namespace));
    e.key_parts.iter().for_each(|(name, value)| text.push_str(&format!("  {name}: {value}\n")));
    if !e.advice.is_empty() {
        text.push_str("\nadvice\n");
        e.advice.iter().for_each(|advice| text.push_str(&format!("  {}\n      {}\n", advice.what, advice.mend)));
    }
    text
}
