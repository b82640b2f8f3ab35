//! `walcast migrate`: puts Walcast's SQL into a database, or prints it.

use std::{io::Write, process::ExitCode};

use walcast_engine::migrate::{MigrateError, MigrateOptions, MigrateReport, migrate, print};

use crate::{cli::MigrateArgs, failure::Failure, running, settings::Settings};

pub async fn run(settings: Settings, args: MigrateArgs) -> Result<ExitCode, Failure> {
    let cache = (&running::cache_settings(&settings)).into();
    let options = MigrateOptions {
        tables: args.tables,
        schemas: args.schemas,
        serve_role: args.serve_role,
        publication_cache: settings.database.publication_cache,
        publication_realtime: settings.database.publication_realtime,
        cache,
        l2_logged: settings.cache.l2_logged,
    };
    let url = settings.database.url.as_ref().map(|url| url.expose());
    if args.print {
        let sql = print(url, &options).await.map_err(failure)?;
        // A pager that was left early is no error.
        let _ = std::io::stdout().write_all(sql.as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    let url = url.ok_or_else(|| {
        Failure::usage("database_url", "no database URL is set")
            .hint("give an administrator's: walcast migrate --database-url postgresql://postgres@localhost/app".to_owned())
    })?;
    tell(&migrate(url, &options).await.map_err(failure)?);
    Ok(ExitCode::SUCCESS)
}

fn failure(error: MigrateError) -> Failure {
    Failure::new(error.code(), with_cause(&error)).hint(error.hint())
}

/// The driver's errors say little themselves and more in their cause.
fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = source.source();
    }
    text
}

fn tell(report: &MigrateReport) {
    if report.applied.is_empty() && report.published.is_empty() && report.relogged.is_none() {
        println!("Nothing to do: the database is up to date.");
    }
    report.applied.iter().for_each(|file| println!("applied    {file}"));
    report.published.iter().for_each(|table| println!("published  {table}"));
    report.relogged.iter().for_each(|why| println!("altered    {why}"));
    for advice in &report.advice {
        println!("\n{}{}", advice.sentence, if advice.sql.is_some() { ":" } else { "" });
        advice.sql.iter().flat_map(|sql| sql.lines()).for_each(|line| println!("  {line}"));
    }
}
