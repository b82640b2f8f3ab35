//! The command line: which commands there are, what each needs, and how it ends.
//! Exit codes: 0 done, 1 failed, 2 not understood. Errors go to stderr as one sentence, a code and a hint.

use std::{ffi::OsString, io::Write, process::ExitCode, time::Duration};

use clap::{ArgAction, ArgMatches, Args, Command as Clap, FromArgMatches, Parser, Subcommand};

use crate::{
    commands,
    failure::Failure,
    settings::{
        Inputs, Loaded, load,
        table::{SETTINGS, Setting},
    },
};

#[derive(Debug, Parser)]
#[command(
    name = "walcast",
    version,
    about = "Commits go in; fresh reads and live screens come out.",
    long_about = "Walcast stands beside PostgreSQL, reads its write-ahead log, and gives applications a cache that is never\n\
                  silently stale and live updates that never stop silently.",
    after_help = "First steps:\n  walcast dev                          try it: a PostgreSQL of its own, a demo, all keys made\n\n\
                  Beside your own database:\n  \
                  walcast migrate --database-url URL   once, as an administrator (--print shows the SQL first)\n  \
                  walcast check                        is everything as it should be?\n  \
                  walcast serve                        as the role that migrate made\n\n\
                  Every setting is a flag, an environment variable and a key in walcast.toml: `walcast serve --help` lists them."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub settings: SettingFlags,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Try Walcast: its own PostgreSQL, the clinic demo and generated keys
    #[command(after_help = "Needs nothing. Examples:\n  walcast dev\n  walcast dev --rate 50\n  walcast dev --reset")]
    Dev(DevArgs),
    /// Serve cache and live updates beside your database
    #[command(
        after_help = "Needs: a migrated database (walcast migrate), WALCAST_DATABASE_URL for the serve role, WALCAST_JWT_SECRET.\n\
                            Example:\n  WALCAST_DATABASE_URL=postgresql://walcast:…@db:5432/app WALCAST_JWT_SECRET_FILE=/run/secrets/jwt walcast serve"
    )]
    Serve,
    /// Put Walcast's schema, roles and publications into a database
    #[command(
        after_help = "Needs: the database URL of an administrator. Creates what is missing and touches nothing that exists.\n\
                            Examples:\n  walcast migrate --print | less\n  walcast migrate --database-url postgresql://postgres@localhost/app\n  \
                            walcast migrate --tables patients,audit.log"
    )]
    Migrate(MigrateArgs),
    /// Look at database and settings, and say what mends what is wrong
    #[command(
        after_help = "Needs: the same settings as serve. Exit code 1 if anything fails.\nExamples:\n  walcast check\n  walcast check --queries\n  walcast check --json"
    )]
    Check(CheckArgs),
    /// Make a token for development
    #[command(after_help = "Needs: WALCAST_JWT_SECRET, or a running `walcast dev`. Prints only the token.\nExamples:\n  \
                            walcast token --sub 6f1c2a34-0000-4000-8000-000000000001\n  walcast token --role service_role --expires 10m\n  \
                            walcast token --claim tenant=7 --claim 'app_metadata={\"plan\":\"pro\"}'\n  \
                            curl -H \"Authorization: Bearer $(walcast token)\" …")]
    Token(TokenArgs),
    /// Watch changes of a running server in the terminal
    #[command(after_help = "Needs: a running server, and WALCAST_JWT_SECRET, --token or a running `walcast dev`.\nExamples:\n  \
                            walcast tail --table patients\n  walcast tail --table public.orders --event UPDATE --json | jq .record")]
    Tail(TailArgs),
    /// Drop cached values of a running server
    #[command(after_help = "Needs: a running server, and WALCAST_JWT_SECRET, --token or a running `walcast dev`.\n\
                            Names one thing; --namespace beside --tag, --pattern or --table narrows it. Nothing is answered from before it once this\n\
                            command ends, on this node, and from the printed position on everywhere.\nExamples:\n  \
                            walcast invalidate --tag patients:id=7\n  walcast invalidate --tag reports --tag tenant:3 --all-of\n  \
                            walcast invalidate --namespace fhir_resource --key Patient/7\n  \
                            walcast invalidate --namespace session --pattern 'user:7:*' --dry-run\n  \
                            walcast invalidate --table public.orders --soft\n  walcast invalidate --all")]
    Invalidate(InvalidateArgs),
    /// Write a snapshot of a running server for somebody who helps
    #[command(after_help = "Needs: a running server, and WALCAST_JWT_SECRET, --token or a running `walcast dev`.\n\
                            Settings without secrets, connections, subscriptions, queues, warnings, metrics, traces; people are masked.\nExamples:\n  \
                            walcast support\n  walcast support --out incident.json\n  walcast support --out - | jq .health")]
    Support(SupportArgs),
    /// Show what a named query's answer depends on, and what would make it better
    #[command(
        after_help = "Needs: WALCAST_DATABASE_URL and queries.dir, as for serve. Runs nothing but the plan.\nExamples:\n  \
                            walcast explain patient_dashboard --param patient_id=7 --claim sub=6f1c2a34-0000-4000-8000-000000000001\n  \
                            walcast explain ward --role service_role --json | jq .tags"
    )]
    Explain(ExplainArgs),
    /// Say whether these claims get a row, and why or why not
    #[command(after_help = "Needs: a running server, and WALCAST_JWT_SECRET, --token or a running `walcast dev`.\n\
                            Whose claims: --role, --sub and --claim, or all of them as --claims JSON, or --as-token for what a client sends.\n\
                            Which row: --key for one of the table's, read as service_role; --row for one that need not be there.\nExamples:\n  \
                            walcast explain-visibility orders --sub 6f1c2a34-0000-4000-8000-000000000001 --key id=7\n  \
                            walcast explain-visibility public.notes --claim tenant=7 --row '{\"id\": 1, \"tenant\": \"7\"}'\n  \
                            walcast explain-visibility orders --as-token \"$JWT\" --key id=7 --json | jq .policies")]
    ExplainVisibility(ExplainVisibilityArgs),
    /// The keeper of dev's private PostgreSQL; `dev` starts it by itself
    #[command(hide = true)]
    Supervise,
    /// Show the settings in force and where each comes from
    Config(ConfigArgs),
}

#[derive(Debug, Clone, Args)]
pub struct DevArgs {
    /// Begin with an empty database
    #[arg(long)]
    pub reset: bool,
    /// Changes that the demo writes per second
    #[arg(long, value_name = "N")]
    pub rate: Option<u32>,
    /// Write nothing by itself
    #[arg(long, conflicts_with = "rate")]
    pub no_writer: bool,
    /// Port for HTTP and WebSocket
    #[arg(long)]
    pub port: Option<u16>,
}

#[derive(Debug, Clone, Args)]
pub struct MigrateArgs {
    /// Print the SQL, for psql, and run nothing; without a database URL, the part that is the same everywhere
    #[arg(long)]
    pub print: bool,
    /// Publish only these tables
    #[arg(long, value_name = "A,B", value_delimiter = ',', conflicts_with = "schemas")]
    pub tables: Vec<String>,
    /// Publish only the tables of these schemas
    #[arg(long, value_name = "S,T", value_delimiter = ',')]
    pub schemas: Vec<String>,
    /// Login role that `walcast serve` will use; made if missing
    #[arg(long, value_name = "NAME", default_value = "walcast")]
    pub serve_role: String,
}

#[derive(Debug, Clone, Args)]
pub struct ExplainArgs {
    /// Name of the query, as in its file
    pub query: String,
    /// A parameter. May be repeated
    #[arg(long = "param", value_name = "K=V")]
    pub params: Vec<String>,
    /// Ask as this database role
    #[arg(long, default_value = "authenticated")]
    pub role: String,
    /// A claim of the caller; JSON if it reads as JSON, else text. May be repeated
    #[arg(long = "claim", value_name = "K=V")]
    pub claims: Vec<String>,
    /// One JSON document instead of text, with the plan
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct ExplainVisibilityArgs {
    /// The table, as table or schema.table
    pub table: String,
    /// The caller's database role; `authenticated` if nothing says otherwise
    #[arg(long, conflicts_with = "as_token")]
    pub role: Option<String>,
    /// Who the caller is; what auth.uid() answers
    #[arg(long, value_name = "UUID", conflicts_with = "as_token")]
    pub sub: Option<String>,
    /// A claim of the caller; JSON if it reads as JSON, else text. May be repeated
    #[arg(long, value_name = "K=V", conflicts_with = "as_token")]
    pub claim: Vec<String>,
    /// All claims at once
    #[arg(long, value_name = "JSON", conflicts_with = "as_token")]
    pub claims: Option<String>,
    /// The caller's own token, as the client sends it
    #[arg(long, value_name = "JWT")]
    pub as_token: Option<String>,
    /// The row by a column's value. May be repeated
    #[arg(long, value_name = "K=V", conflicts_with = "row")]
    pub key: Vec<String>,
    /// The row itself; columns that it leaves out are null
    #[arg(long, value_name = "JSON")]
    pub row: Option<String>,
    /// One JSON document instead of lines
    #[arg(long)]
    pub json: bool,
    /// Where the server is; else the running dev, else server.listen
    #[arg(long)]
    pub url: Option<String>,
    /// Ask as the holder of this token instead of as service_role
    #[arg(long)]
    pub token: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Also name what would make the named queries cheaper: indexes, replica identities, publications
    #[arg(long)]
    pub queries: bool,
    /// One JSON document instead of lines
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub struct TokenArgs {
    /// Database role that the token names
    #[arg(long, default_value = "authenticated")]
    pub role: String,
    /// Who the token is for; what auth.uid() answers
    #[arg(long, value_name = "UUID")]
    pub sub: Option<String>,
    /// Another claim; JSON if it reads as JSON, else text. May be repeated
    #[arg(long = "claim", value_name = "K=V")]
    pub claims: Vec<String>,
    /// How long it is good: 10m, 1h, 30d
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub expires: String,
}

#[derive(Debug, Clone, Args)]
pub struct TailArgs {
    /// `table` or `schema.table`
    #[arg(long)]
    pub table: String,
    /// Only these changes
    #[arg(long, value_parser = ["INSERT", "UPDATE", "DELETE", "*"], ignore_case = true)]
    pub event: Option<String>,
    /// One JSON document a line
    #[arg(long)]
    pub json: bool,
    /// Where the server is; else the running dev, else server.listen
    #[arg(long)]
    pub url: Option<String>,
    /// Watch as the holder of this token instead of as service_role
    #[arg(long)]
    pub token: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub struct SupportArgs {
    /// Where to write it: a new file, or - for the terminal [default: walcast-support-TIME.json]
    #[arg(long, value_name = "FILE")]
    pub out: Option<std::path::PathBuf>,
    /// Where the server is; else the running dev, else server.listen
    #[arg(long)]
    pub url: Option<String>,
    /// Ask as the holder of this token instead of as service_role
    #[arg(long)]
    pub token: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub struct InvalidateArgs {
    /// The namespace of the keys; with nothing else, all of it
    #[arg(long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// A key of the namespace. May be repeated
    #[arg(long = "key", value_name = "KEY")]
    pub keys: Vec<String>,
    /// A tag: a table's, a row's, or your own. May be repeated
    #[arg(long = "tag", value_name = "TAG")]
    pub tags: Vec<String>,
    /// Only what carries all of the tags; else any of them
    #[arg(long)]
    pub all_of: bool,
    /// Keys like this: `*` is any text, `?` any one character
    #[arg(long, value_name = "GLOB")]
    pub pattern: Option<String>,
    /// Whatever depends on this table or on rows of it
    #[arg(long, value_name = "TABLE")]
    pub table: Option<String>,
    /// Everything, in every namespace
    #[arg(long)]
    pub all: bool,
    /// Count as expired instead: stale where the namespace answers stale, until made anew
    #[arg(long)]
    pub soft: bool,
    /// Say what would go, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// One JSON document instead of lines
    #[arg(long)]
    pub json: bool,
    /// Where the server is; else the running dev, else server.listen
    #[arg(long)]
    pub url: Option<String>,
    /// Ask as the holder of this token instead of as service_role
    #[arg(long)]
    pub token: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// Print the reference page of all settings
    #[arg(long)]
    pub reference: bool,
}

/// `--config` and one flag for each line of the settings table.
#[derive(Debug, Clone, Default)]
pub struct SettingFlags {
    pub config: Option<std::path::PathBuf>,
    /// Key and text of each flag that was given.
    pub given: Vec<(String, String)>,
}

impl SettingFlags {
    fn arg(setting: &'static Setting) -> clap::Arg {
        let mut help = setting.help.to_owned();
        if !setting.default.is_empty() {
            help.push_str(&format!(" [default: {}]", setting.default));
        }
        help.push_str(&format!(" [env: {}]", setting.env()));
        let mut arg = clap::Arg::new(setting.key)
            .long(setting.flag())
            .value_name(setting.kind.name().replace('`', "").to_uppercase().replace(' ', "_"))
            .help(help)
            .help_heading("Settings")
            .hide_short_help(true)
            .global(true)
            .action(ArgAction::Set);
        if let Some(short) = setting.short_flag() {
            arg = arg.visible_alias(short);
        }
        if setting.is_flag() {
            // With `=` only, so that the word after it stays a word.
            arg = arg.num_args(0..=1).require_equals(true).default_missing_value("true");
        }
        arg
    }
}

impl Args for SettingFlags {
    fn augment_args(command: Clap) -> Clap {
        let config = clap::Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(std::path::PathBuf))
            .help("Settings file [default: walcast.toml] [env: WALCAST_CONFIG]")
            .global(true);
        command.arg(config).args(SETTINGS.iter().map(SettingFlags::arg))
    }

    fn augment_args_for_update(command: Clap) -> Clap {
        SettingFlags::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<SettingFlags, clap::Error> {
        let given = |setting: &Setting| Some((setting.key.to_owned(), matches.get_one::<String>(setting.key)?.clone()));
        Ok(SettingFlags {
            config: matches.get_one::<std::path::PathBuf>("config").cloned(),
            given: SETTINGS.iter().filter_map(given).collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = SettingFlags::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The whole program: reads arguments and environment, runs the command, tells what went wrong.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        // clap's own text names the nearest flag; help and version are no errors.
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match execute(cli) {
        Ok(code) => code,
        Err(failure) => {
            eprint!("{}", failure.report());
            ExitCode::from(failure.exit_code())
        }
    }
}

fn execute(cli: Cli) -> Result<ExitCode, Failure> {
    if let Command::Config(ConfigArgs { reference: true }) = cli.command {
        let _ = std::io::stdout().write_all(crate::settings::reference().as_bytes());
        return Ok(ExitCode::SUCCESS);
    }
    // Before the settings: a supervisor must not fail over a setting that it does not use.
    if let Command::Supervise = cli.command {
        return Ok(walcast_cluster::supervise());
    }
    let mut inputs = inputs(cli.settings)?;
    if matches!(cli.command, Command::Dev(_)) {
        inputs.instead = Some((commands::dev::SETTINGS_NAME, commands::dev::SETTINGS_TEXT));
    }
    let Loaded { mut settings, effective } = load(&inputs)?;
    // The banner of `dev` is for reading: only trouble speaks after it, unless a level was asked for.
    if matches!(cli.command, Command::Dev(_)) && effective.iter().any(|line| line.key == "log.level" && line.origin == "default")
    {
        settings.log.level = "warn".into();
    }
    match cli.command {
        Command::Migrate(args) => block_on(commands::migrate::run(settings, args)),
        Command::Check(args) => block_on(commands::check::run(settings, args)),
        Command::Token(args) => commands::token::run(settings, args),
        Command::Invalidate(args) => block_on(commands::invalidate::run(settings, args)),
        Command::Support(args) => block_on(commands::support::run(settings, args)),
        Command::Tail(args) => block_on(commands::tail::run(settings, args)),
        Command::Explain(args) => block_on(commands::explain::run(settings, args)),
        Command::ExplainVisibility(args) => block_on(commands::explain_visibility::run(settings, args)),
        Command::Config(_) => {
            effective.iter().for_each(|line| println!("{} = {}  # {}", line.key, line.shown, line.origin));
            Ok(ExitCode::SUCCESS)
        }
        Command::Dev(args) => block_on(commands::dev::run(settings, args)),
        Command::Serve => block_on(commands::serve::run(settings)),
        Command::Supervise => Ok(walcast_cluster::supervise()),
    }
}

fn inputs(flags: SettingFlags) -> Result<Inputs, Failure> {
    let directory = std::env::current_dir()
        .map_err(|error| Failure::new("directory", format!("the working directory cannot be read: {error}")))?;
    let env = std::env::vars_os()
        .map(|(name, text)| (name.to_string_lossy().into_owned(), text.to_string_lossy().into_owned()))
        .collect();
    Ok(Inputs { directory, env, flags: flags.given, config: flags.config, instead: None })
}

fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("runtime", format!("no threads can be started: {error}")))?;
    let answer = runtime.block_on(command);
    // A fetch that still runs must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(10));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_may_stand_before_and_after_the_command() {
        for line in
            ["walcast --cache.l1-bytes 5MB serve", "walcast serve --cache.l1-bytes 5MB", "walcast serve --cache.l1-bytes=5MB"]
        {
            assert_eq!(parse(line).unwrap().settings.given, [("cache.l1_bytes".to_owned(), "5MB".to_owned())], "{line}");
        }
        let given = parse("walcast --cache.strict serve --cache.l2=false --database-url postgresql://x --listen 0.0.0.0:1")
            .unwrap()
            .settings
            .given;
        let keys: Vec<_> = given.iter().map(|(key, text)| format!("{key}={text}")).collect();
        assert_eq!(keys, ["database.url=postgresql://x", "server.listen=0.0.0.0:1", "cache.strict=true", "cache.l2=false"]);
        assert_eq!(parse("walcast check --config a.toml").unwrap().settings.config.unwrap().to_str(), Some("a.toml"));
    }

    #[test]
    fn a_misspelt_flag_is_told_the_nearest() {
        let error = parse("walcast serve --cache.l1-byte 5").unwrap_err();
        assert!(error.to_string().contains("--cache.l1-bytes"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn help_teaches() {
        let help = parse("walcast migrate --help").unwrap_err().to_string();
        for part in ["--print", "Needs:", "walcast migrate --tables", "--cache.l1-bytes", "WALCAST_DATABASE_URL"] {
            assert!(help.contains(part), "{part} in {help}");
        }
        // The short help stays short.
        assert!(!parse("walcast migrate -h").unwrap_err().to_string().contains("--cache.l1-bytes"));
    }
}
