//! `walcast explain-visibility TABLE`: do these claims get this row, and why. Asks a running server; the server's own judge answers.

use std::{process::ExitCode, time::Duration};

use serde_json::{Map, Value, json};

use super::{
    reach::{Reach, cause, refused},
    tail::lines::clean,
};
use crate::{cli::ExplainVisibilityArgs, failure::Failure, settings::Settings};

const PATIENCE: Duration = Duration::from_secs(30);

pub async fn run(settings: Settings, args: ExplainVisibilityArgs) -> Result<ExitCode, Failure> {
    let asked = asked(&args)?;
    let reach = Reach::new(&settings, args.url.as_deref(), args.token.as_deref())?;
    let request = reach.client.post(format!("{}/admin/v1/explain-visibility", reach.base)).bearer_auth(reach.token()?);
    let away = |error: reqwest::Error| {
        Failure::new("no_server", format!("no server answers at {}{}", reach.base, cause(&error)))
            .hint("start `walcast serve` or `walcast dev`, or name it with --url".to_owned())
    };
    let response = request.timeout(PATIENCE).json(&asked).send().await.map_err(away)?;
    if !response.status().is_success() {
        return Err(refused(response, "is this the right --url?").await);
    }
    let answer: Value = response.json().await.map_err(away)?;
    if args.json {
        println!("{answer:#}");
    } else {
        print!("{}", told(&answer));
    }
    Ok(ExitCode::SUCCESS)
}

/// The request's body.
fn asked(args: &ExplainVisibilityArgs) -> Result<Value, Failure> {
    let wrong = |why: String| {
        Failure::usage("wrong_argument", why)
            .hint("for example: walcast explain-visibility orders --sub 6f1c… --claim tenant=7 --key id=7".to_owned())
    };
    let object = |name: &str, text: &str| {
        serde_json::from_str::<Map<String, Value>>(text).map_err(|error| wrong(format!("--{name} is not a JSON object: {error}")))
    };
    let pairs = |name: &str, list: &[String]| -> Result<Map<String, Value>, Failure> {
        let pair = |text: &String| match text.split_once('=') {
            Some((key, value)) => Ok((key.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into()))),
            None => Err(wrong(format!("--{name} {text} has no `=`"))),
        };
        list.iter().map(pair).collect()
    };
    let mut body = Map::new();
    body.insert("table".into(), args.table.as_str().into());
    match &args.as_token {
        Some(token) => drop(body.insert("token".into(), token.as_str().into())),
        None => {
            let mut claims = args.claims.as_deref().map(|text| object("claims", text)).transpose()?.unwrap_or_default();
            claims.extend(pairs("claim", &args.claim)?);
            let named = [("role", &args.role), ("sub", &args.sub)];
            claims.extend(named.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.as_deref()?.into()))));
            body.insert("claims".into(), claims.into());
        }
    }
    match (&args.row, args.key.is_empty()) {
        (Some(row), true) => drop(body.insert("row".into(), object("row", row)?.into())),
        (None, false) => drop(body.insert("key".into(), pairs("key", &args.key)?.into())),
        _ => return Err(wrong("say which row: --key id=7, or --row '{\"id\": 7, …}'".into())),
    }
    Ok(Value::Object(body))
}

fn told(answer: &Value) -> String {
    let text = |value: &Value| clean(value.as_str().unwrap_or_default());
    let names = |value: &Value| value.as_array().into_iter().flatten().map(text).collect::<Vec<_>>().join(", ");
    let yes = |value: &Value| if *value == json!(true) { "yes" } else { "no" };
    let sees = if answer["sees"] == true { "sees this row" } else { "does not see this row" };
    let mut out = format!("{} {sees} of {}: {}\n\n", text(&answer["role"]), text(&answer["table"]), text(&answer["why"]));
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<13} {value}\n"));
    let published = &answer["published"];
    let operations: Vec<&str> = ["insert", "update", "delete"].into_iter().filter(|of| published[*of] == true).collect();
    line(
        "published",
        match yes(&published["to_clients"]) {
            "yes" => format!("in {}: {}", text(&published["publication"]), operations.join(", ")),
            _ => format!("not in {}: nobody hears of its rows", text(&published["publication"])),
        },
    );
    let privileges = &answer["privileges"];
    let withheld = names(&privileges["columns_withheld"]);
    line(
        "may read",
        match (yes(&privileges["table"]), withheld.is_empty()) {
            ("no", _) => "nothing of the table".into(),
            (_, true) => names(&privileges["columns_shown"]),
            (_, false) => format!("{}; not {withheld}", names(&privileges["columns_shown"])),
        },
    );
    line("row security", text(&answer["row_security"]));
    for policy in answer["policies"].as_array().into_iter().flatten() {
        let says = match (&policy["answer"], &policy["error"]) {
            (_, Value::String(error)) => format!("fails: {}", clean(error)),
            (Value::Bool(true), _) => "true".into(),
            (Value::Bool(false), _) => "false".into(),
            _ => "null, which admits nothing".into(),
        };
        line("", format!("{} `{}`: {says}", text(&policy["kind"]), text(&policy["name"])));
        // PostgreSQL breaks its print into lines.
        let using = policy["using"].as_str().unwrap_or_default().split('\n').map(str::trim).collect::<Vec<_>>().join(" ");
        line("", format!("  {}", clean(&using)));
    }
    if let Value::String(filter) = &answer["row_filter"] {
        line("row filter", clean(filter));
    }
    line("decided", text(&answer["decided"]));
    if let Value::String(why) = &answer["not_in_memory_because"] {
        line("", format!("not in memory: {}", clean(why)));
    }
    let reads = &answer["reads"];
    let tables = names(&reads["tables"]);
    if !tables.is_empty() {
        let kept =
            if answer["remembered_until_a_table_moves"] == true { "; answers are remembered until they change" } else { "" };
        line("reads", format!("{tables}{kept}"));
    }
    if let Value::String(unheard) = &reads["not_published"] {
        line("", format!("{} is not published: whoever may see a change is told to read again", clean(unheard)));
    }
    for operation in ["insert", "update", "delete"] {
        let of = &answer[operation];
        let why = of["why"].as_str().map(|why| format!(" ({})", clean(why))).unwrap_or_default();
        let old = match (&of["old_record"], of["told"].as_str()) {
            (Value::String(old), Some("the change")) => format!("; old record: {}", clean(old)),
            _ => String::new(),
        };
        line(&format!("on {}", operation.to_uppercase()), format!("told {}{why}{old}", text(&of["told"])));
    }
    out
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn of(line: &str) -> Result<Value, String> {
        let cli = Cli::try_parse_from(format!("walcast explain-visibility {line}").split_whitespace())
            .map_err(|error| error.to_string())?;
        let Command::ExplainVisibility(args) = cli.command else { return Err("another command".into()) };
        asked(&args).map_err(|failure| failure.report())
    }

    #[test]
    fn claims_and_row_are_named_in_several_ways_and_become_one_request() {
        for (line, body) in [
            (
                "orders --sub u1 --claim tenant=7 --key id=7",
                r#"{"table":"orders","claims":{"sub":"u1","tenant":7},"key":{"id":7}}"#,
            ),
            (r#"a.b --role anon --row {"id":7}"#, r#"{"table":"a.b","claims":{"role":"anon"},"row":{"id":7}}"#),
            (r#"t --claims {"app":{"x":[1]}} --key a=b=c"#, r#"{"table":"t","claims":{"app":{"x":[1]}},"key":{"a":"b=c"}}"#),
            ("t --as-token ey.a.b --key id=1", r#"{"table":"t","token":"ey.a.b","key":{"id":1}}"#),
        ] {
            assert_eq!(of(line), Ok(serde_json::from_str(body).unwrap()), "{line}");
        }
        for line in [
            "",
            "t",
            "t --key id",
            "t --row 7",
            "t --key id=1 --row {}",
            "t --as-token x --sub y --key id=1",
            "t --claims [] --key a=1",
        ] {
            assert!(of(line).is_err(), "{line}");
        }
    }
}
