//! Measures the real `walcast` program beside a throw-away PostgreSQL and prints figures and ratios.
//!
//! Run by hand and by `make bench`. Asserts nothing, stays on the loopback, leaves nothing behind.

mod drain;
mod figures;
mod l1;
mod latency;
mod listener;
mod load;
mod machine;
mod memory;
mod process;
mod reads;
mod realtime;
mod redis;
mod stage;
mod visibility;
mod wire;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "walcast-bench",
    version,
    about = "Measures walcast beside a throw-away PostgreSQL: figures and ratios, no verdict",
    after_help = "The program measured is the one that WALCAST_BIN names, else `walcast` beside this program:\n\
                  \x20 cargo build --release -p walcast-server -p walcast-bench && target/release/walcast-bench\n\n\
                  Compare only figures of one run on a quiet machine. bench/README.md tells what the columns mean."
)]
struct Cli {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    size: Size,
}

#[derive(Debug, Clone, PartialEq, Subcommand)]
enum What {
    /// How fast a backlog goes through the whole pipeline, beside pg_recvlogical on the same changes
    Drain,
    /// Commit acknowledged to event received, at a steady rate, over WebSocket and SSE
    Latency,
    /// Resident memory: idle, for each idle WebSocket subscription, after a drained backlog
    Memory,
    /// Hits of GET /cache and GET /query at 1 and 64 connections, beside Redis and the uncached query through pgbench
    Hits,
    /// The second tier beside plain prepared SQL and Redis
    L2,
    /// Commit acknowledged to entry gone, beside 100 and 1,000 commits/s
    Invalidated,
    /// What a write of one tenant costs the cached answers of 999 others
    Tenants,
    /// A hit of the first tier beside quick_cache, moka, foyer and a mutexed LRU, on one thread and on two
    L1,
    /// How often the first tier hits, beside the same and the optimum, on generated loads and the traces in WALCAST_TRACES
    HitRatio,
    /// How long it takes to invalidate a tag that a million entries carry
    Tag,
    /// What fan-out costs: row changes to many WebSocket subscribers beside Nchan, with row security, and idle connections
    Realtime {
        /// Only these, separated by commas
        #[arg(long, value_enum, value_delimiter = ',')]
        only: Vec<realtime::Scenario>,
        /// Leave out Nchan
        #[arg(long)]
        without_peer: bool,
    },
    /// Who may see a row: claims bound, decided in memory, asked for many callers at once and for each
    Visibility,
    /// All of them, one after the other (this is the default)
    All,
}

#[derive(Debug, Clone, Copy, Args)]
struct Size {
    /// Rounds; in each all sides do the same, one after the other
    #[arg(long, global = true, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// One-row transactions of the first backlog
    #[arg(long, global = true, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..=10_000_000))]
    transactions: u32,
    /// Rows of the second backlog, in transactions of 1,000
    #[arg(long, global = true, default_value_t = 300_000, value_parser = clap::value_parser!(u32).range(10_000..=30_000_000))]
    rows: u32,
    /// Seconds that each measurement of `latency` and `realtime` takes
    #[arg(long, global = true, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Commits a second in `latency`
    #[arg(long, global = true, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    rate: u32,
    /// Connections of `memory`
    #[arg(long, global = true, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(10..=9_000))]
    connections: u32,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = run(&cli) => outcome,
            // Returning drops what runs: processes end and their directories go.
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("walcast-bench: {error:#}");
    ExitCode::FAILURE
}

async fn run(cli: &Cli) -> anyhow::Result<()> {
    let what = cli.what.as_ref().unwrap_or(&What::All);
    // These need neither PostgreSQL nor the program.
    let by_itself = matches!(what, What::L1 | What::HitRatio | What::Tag);
    machine::print(by_itself).await?;
    if matches!(what, What::L1 | What::All) {
        l1::hits(cli.size.rounds)?;
    }
    if matches!(what, What::HitRatio | What::All) {
        l1::ratio()?;
    }
    if matches!(what, What::Tag | What::All) {
        l1::tag(cli.size.rounds)?;
    }
    if matches!(what, What::Drain | What::All) {
        drain::run(&cli.size).await?;
    }
    if matches!(what, What::Latency | What::All) {
        latency::run(&cli.size).await?;
    }
    if matches!(what, What::Memory | What::All) {
        memory::run(&cli.size).await?;
    }
    if matches!(what, What::Hits | What::All) {
        reads::hits(&cli.size).await?;
    }
    if matches!(what, What::L2 | What::All) {
        reads::l2(&cli.size).await?;
    }
    if matches!(what, What::Invalidated | What::All) {
        reads::invalidated(&cli.size).await?;
    }
    if matches!(what, What::Tenants | What::All) {
        reads::tenants(&cli.size).await?;
    }
    match what {
        What::Realtime { only, without_peer } => realtime::run(&cli.size, only, !without_peer).await?,
        What::All => realtime::run(&cli.size, &[], true).await?,
        _ => {}
    }
    if matches!(what, What::Visibility | What::All) {
        visibility::run(cli.size.rounds).await?;
    }
    machine::print_repeat();
    Ok(())
}
