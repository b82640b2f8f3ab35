//! Runs a private PostgreSQL in a directory until Ctrl-C: `private-postgres DIR`. For trying the
//! cluster by hand, and for the tests that kill an owner. Not part of what is shipped.

use std::process::ExitCode;
use std::time::Duration;

use walcast_cluster::{Binaries, ClusterConfig, ClusterError, Supervised, supervise};

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("supervise") => supervise(),
        Some(dir) => match run(dir) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        },
        None => {
            eprintln!("usage: private-postgres DIR");
            ExitCode::FAILURE
        }
    }
}

fn run(dir: &str) -> Result<(), ClusterError> {
    let config = ClusterConfig::new(Binaries::find(None)?, dir);
    let program =
        std::env::current_exe().map_err(|source| ClusterError::Io { doing: "finding", path: "this program".into(), source })?;
    let mut server = Supervised::spawn(&program, &["supervise"], &config)?;
    println!("{}", server.url());
    while server.is_running() {
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(ClusterError::Supervisor { reason: format!("PostgreSQL is gone; see {}", server.log_file().display()) })
}
