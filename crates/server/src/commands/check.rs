//! `walcast check`: the doctor's findings, each with what mends it. Exit code 1 if anything fails.

use std::{io::IsTerminal, process::ExitCode};

use serde_json::json;
use walcast_engine::doctor::{Expectations, Finding, Level, check};

use crate::{cli::CheckArgs, failure::Failure, running, settings::Settings};

/// What `serve` needs of a database, out of the settings.
pub fn expectations(settings: &Settings) -> Expectations {
    Expectations {
        slot: settings.database.slot.clone(),
        publication_cache: settings.database.publication_cache.clone(),
        publication_realtime: settings.database.publication_realtime.clone(),
        allowed_roles: settings.auth.allowed_roles.clone(),
        acknowledge_bytes: settings.stream.acknowledge_bytes,
        max_connections: settings.database.max_connections,
        jwt_secret_bytes: settings.auth.jwt_secret.as_ref().map(|secret| secret.expose().len()),
        tags: running::tag_rules(settings),
    }
}

pub async fn run(settings: Settings, args: CheckArgs) -> Result<ExitCode, Failure> {
    let url = settings.database.url.as_ref().map(|url| url.expose());
    let mut findings = check(url, &expectations(&settings)).await;
    findings.extend(queries(&settings, args.queries).await);
    let failed = findings.iter().any(|finding| finding.level == Level::Fail);
    if args.json {
        println!("{:#}", document(&findings, !failed));
    } else {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        print!("{}", lines(&findings, colour));
    }
    Ok(ExitCode::from(u8::from(failed)))
}

/// Of the named queries, if a folder is named.
async fn queries(settings: &Settings, advice: bool) -> Vec<Finding> {
    walcast_engine::install_crypto();
    let failed = |failure: &Failure| Finding {
        check: "queries",
        level: Level::Fail,
        line: failure.report().trim_end().trim_start_matches("error: ").to_owned(),
        fix: None,
    };
    match super::explain::desk(settings).await {
        Ok(None) => Vec::new(),
        Ok(Some(desk)) => desk.check(advice).await,
        Err(failure) => vec![failed(&failure)],
    }
}

fn document(findings: &[Finding], ok: bool) -> serde_json::Value {
    let one = |f: &Finding| json!({"check": f.check, "level": f.level.name(), "line": f.line, "fix": f.fix});
    json!({"ok": ok, "findings": findings.iter().map(one).collect::<Vec<_>>()})
}

fn lines(findings: &[Finding], colour: bool) -> String {
    let mut text = String::new();
    for finding in findings {
        let (on, off) = match (colour, finding.level) {
            (false, _) => ("", ""),
            (true, Level::Ok) => ("\x1b[32m", "\x1b[0m"),
            (true, Level::Warn) => ("\x1b[33m", "\x1b[0m"),
            (true, Level::Fail) => ("\x1b[31m", "\x1b[0m"),
        };
        text.push_str(&format!("{on}{:<4}{off}  {}: {}\n", finding.level.name(), finding.check, finding.line));
        for line in finding.fix.iter().flat_map(|fix| fix.lines()) {
            text.push_str(&format!("        {line}\n"));
        }
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    text.push_str(&format!("\n{} ok, {} warnings, {} failures\n", count(Level::Ok), count(Level::Warn), count(Level::Fail)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_with_its_cure_below() {
        let findings = [
            Finding { check: "version", level: Level::Ok, line: "PostgreSQL 17".into(), fix: None },
            Finding {
                check: "wal_level",
                level: Level::Fail,
                line: "wal_level is replica".into(),
                fix: Some("alter system …;\n-- restart".into()),
            },
        ];
        let text = lines(&findings, false);
        assert_eq!(
            text,
            "ok    version: PostgreSQL 17\nfail  wal_level: wal_level is replica\n        alter system …;\n        -- restart\n\n1 ok, 0 warnings, 1 failures\n"
        );
        assert_eq!(document(&findings, false)["findings"][1]["level"], "fail");
    }
}
