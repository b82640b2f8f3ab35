//! `walcast invalidate`: drops cached values of a running server, and says how many and from which position on.
//!
//! Asks `POST /cache/v1/invalidate` for one thing; the server decides what it means and who may.

use std::{process::ExitCode, time::Duration};

use serde_json::{Map, Value, json};

use super::reach::{Reach, cause, refused};
use crate::{cli::InvalidateArgs, failure::Failure, settings::Settings};

/// The server waits up to 5 s for the stream.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn run(settings: Settings, args: InvalidateArgs) -> Result<ExitCode, Failure> {
    let asked = asked(&args)?;
    let reach = Reach::new(&settings, args.url.as_deref(), args.token.as_deref())?;
    let request = reach.client.post(format!("{}/cache/v1/invalidate", reach.base)).bearer_auth(reach.token()?);
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
        println!("{answer}");
    } else {
        print!("{}", told(&answer));
    }
    Ok(ExitCode::SUCCESS)
}

/// The request's body. What names nothing, or two things, never leaves here.
fn asked(args: &InvalidateArgs) -> Result<Value, Failure> {
    let wrong =
        |why: &str| Failure::usage("wrong_argument", why).hint("for example: walcast invalidate --tag patients:id=7".to_owned());
    let named = [!args.keys.is_empty(), !args.tags.is_empty(), args.pattern.is_some(), args.table.is_some(), args.all];
    match named.iter().filter(|is_named| **is_named).count() {
        0 if args.namespace.is_none() => {
            return Err(wrong("nothing is named: say --key, --tag, --pattern, --table, --namespace or --all"));
        }
        0 | 1 => {}
        _ => return Err(wrong("one thing at a time: --key, --tag, --pattern, --table or --all")),
    }
    if !args.keys.is_empty() && args.namespace.is_none() {
        return Err(wrong("a key needs its --namespace"));
    }
    if args.all && args.namespace.is_some() {
        return Err(wrong("--all is more than a --namespace: leave one of them out"));
    }
    if args.all_of && args.tags.is_empty() {
        return Err(wrong("--all-of says how tags are meant, and there is no --tag"));
    }
    let mut body = Map::new();
    let mut say = |name: &str, value: Option<Value>| value.map(|value| body.insert(name.to_owned(), value));
    say("namespace", args.namespace.as_deref().map(Value::from));
    say("keys", (!args.keys.is_empty()).then(|| json!(args.keys)));
    say("tags", (!args.tags.is_empty()).then(|| json!(args.tags)));
    say("match", args.all_of.then(|| "all".into()));
    say("pattern", args.pattern.as_deref().map(Value::from));
    say("table", args.table.as_deref().map(Value::from));
    say("everything", args.all.then_some(true.into()));
    say("soft", args.soft.then_some(true.into()));
    say("dry_run", args.dry_run.then_some(true.into()));
    Ok(Value::Object(body))
}

fn told(answer: &Value) -> String {
    let text = |name: &str| answer[name].as_str().unwrap_or("unknown").to_owned();
    let about = if answer["estimate"] == true { "about " } else { "" };
    let count = answer["invalidated"].as_u64().unwrap_or_default();
    let entries = if count == 1 { "entry" } else { "entries" };
    if answer["dry_run"] != true {
        return format!("invalidated  {about}{count} {entries}\nposition     {}\n", text("position"));
    }
    let mut lines = format!("would go  {about}{count} {entries}; nothing was done\nposition  {}\n", text("position"));
    for key in answer["sample"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        lines.push_str(&format!("such as   {}\n", super::tail::lines::clean(key)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn of(line: &str) -> Result<Value, String> {
        let cli =
            Cli::try_parse_from(format!("walcast invalidate {line}").split_whitespace()).map_err(|error| error.to_string())?;
        let Command::Invalidate(args) = cli.command else { return Err("another command".into()) };
        asked(&args).map_err(|failure| failure.report())
    }

    #[test]
    fn each_way_to_name_something_becomes_one_request() {
        for (line, body) in [
            ("--namespace n --key a --key b/c", r#"{"keys":["a","b/c"],"namespace":"n"}"#),
            ("--tag patients:id=7 --tag x --all-of", r#"{"match":"all","tags":["patients:id=7","x"]}"#),
            ("--namespace n --pattern user:7:* --soft", r#"{"namespace":"n","pattern":"user:7:*","soft":true}"#),
            ("--table public.patients --dry-run", r#"{"dry_run":true,"table":"public.patients"}"#),
            ("--namespace n", r#"{"namespace":"n"}"#),
            ("--all", r#"{"everything":true}"#),
        ] {
            assert_eq!(of(line), Ok(serde_json::from_str(body).unwrap()), "{line}");
        }
    }

    #[test]
    fn what_is_not_one_thing_is_refused_before_anybody_is_asked() {
        for line in ["", "--key a", "--all --namespace n", "--tag a --table b", "--table b --all-of", "--all --pattern *"] {
            assert!(of(line).is_err_and(|why| why.contains("[wrong_argument]")), "{line}");
        }
    }
}
