//! Keeps a private PostgreSQL no longer than its owner lives. The program re-executes itself as
//! the supervisor (`supervise` is the body of that hidden subcommand); the owner (`walcast dev`)
//! holds a `Supervised` and with it the only write end of a pipe. When the owner is gone, however
//! it went, the pipe closes and the supervisor stops PostgreSQL: fast, then at once after 10 s.
//!
//! Supervisor and server are in process groups of their own, so Ctrl-C reaches the owner alone. If the
//! supervisor itself is killed -9, the tether between it and the server stops the server at once; if
//! that shell is killed too, the next start finds what is left over and ends it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::binaries::Binaries;
use crate::cluster::{Access, Cluster, ClusterConfig, Durability};
use crate::error::ClusterError;

/// How soon a server that ended by itself is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// First line from the owner.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    binaries: PathBuf,
    data_dir: PathBuf,
    port: Option<u16>,
    settings: Vec<(String, String)>,
    superuser: String,
    access: Access,
    durability: Durability,
    owner_pid: u32,
}

/// First line back.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Report {
    Started { url: String, port: u16, log_file: PathBuf },
    Failed(String),
}

/// The owner's half: a running server that stops when this is dropped.
#[derive(Debug)]
pub struct Supervised {
    supervisor: Child,
    url: String,
    port: u16,
    log_file: PathBuf,
}

impl Supervised {
    /// Runs `program args…`, whose body must be [`supervise`], and returns when the server accepts connections.
    pub fn spawn(program: &Path, args: &[&str], config: &ClusterConfig) -> Result<Supervised, ClusterError> {
        let mut supervisor = Command::new(program)
            .args(args)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Its complaints come as a report; an inherited stderr would keep the owner's open after its end.
            .stderr(Stdio::null())
            .spawn()
            .map_err(ClusterError::io("starting the supervisor", program))?;
        match hand_over(&mut supervisor, config) {
            Ok(Report::Started { url, port, log_file }) => Ok(Supervised { supervisor, url, port, log_file }),
            Ok(Report::Failed(reason)) => {
                let _ = end(&mut supervisor);
                Err(ClusterError::Supervisor { reason })
            }
            Err(error) => {
                let _ = end(&mut supervisor);
                Err(ClusterError::Supervisor {
                    reason: format!("it gave no report ({error}); look at server.log in the data directory"),
                })
            }
        }
    }

    /// For the superuser and database `postgres`.
    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn log_file(&self) -> &Path {
        &self.log_file
    }

    /// False once the server has ended, by itself or by somebody's hand.
    pub fn is_running(&mut self) -> bool {
        matches!(self.supervisor.try_wait(), Ok(None))
    }

    /// Stops the server in order and waits until it is gone: up to half a minute, mostly much less.
    pub fn stop(mut self) -> Result<(), ClusterError> {
        end(&mut self.supervisor).map_err(|error| ClusterError::Supervisor { reason: error.to_string() })
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = end(&mut self.supervisor);
    }
}

fn hand_over(supervisor: &mut Child, config: &ClusterConfig) -> io::Result<Report> {
    let order = Order {
        binaries: config.binaries.dir().to_path_buf(),
        data_dir: config.data_dir.clone(),
        port: config.port,
        settings: config.settings.clone(),
        superuser: config.superuser.clone(),
        access: config.access,
        durability: config.durability,
        owner_pid: config.owner_pid,
    };
    let pipe = supervisor.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
    writeln!(pipe, "{}", serde_json::to_string(&order)?)?;
    let mut line = String::new();
    let answers = supervisor.stdout.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
    // Only one line ever comes, so nothing is lost with the buffer.
    BufReader::new(answers).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

fn end(supervisor: &mut Child) -> io::Result<()> {
    drop(supervisor.stdin.take());
    supervisor.wait().map(|_| ())
}

/// The body of the hidden subcommand: takes its order from stdin, reports on stdout, ends with its owner.
/// It blocks, and must not be called from inside an async runtime.
pub fn supervise() -> ExitCode {
    let (cluster, reasons_to_end) = match obey() {
        Ok(started) => started,
        Err(reason) => {
            report(&Report::Failed(reason));
            return ExitCode::FAILURE;
        }
    };
    watch(cluster, &reasons_to_end)
}

fn obey() -> Result<(Cluster, mpsc::Receiver<()>), String> {
    let (sender, reasons_to_end) = mpsc::channel();
    // Signals first: one that comes during initdb must wait, not kill us and leave a half-made directory.
    end_on_signals(sender.clone()).map_err(|error| format!("catching signals: {error}"))?;
    let mut line = String::new();
    io::stdin().read_line(&mut line).map_err(|error| format!("reading the order: {error}"))?;
    let order: Order = serde_json::from_str(&line)
        .map_err(|error| format!("this command is for `walcast dev` alone, which sends it an order: {error}"))?;
    end_on_close(sender);
    let cluster = start(order).map_err(|error| error.to_string())?;
    report(&Report::Started { url: cluster.url(), port: cluster.port(), log_file: cluster.log_file() });
    Ok((cluster, reasons_to_end))
}

fn start(order: Order) -> Result<Cluster, ClusterError> {
    let mut cluster = Cluster::open(ClusterConfig {
        binaries: Binaries::at(&order.binaries)?,
        data_dir: order.data_dir,
        port: order.port,
        settings: order.settings,
        superuser: order.superuser,
        access: order.access,
        durability: order.durability,
        owner_pid: order.owner_pid,
    })?;
    cluster.start()?;
    Ok(cluster)
}

fn watch(mut cluster: Cluster, reasons_to_end: &mpsc::Receiver<()>) -> ExitCode {
    loop {
        match reasons_to_end.recv_timeout(LOOK_EVERY) {
            Err(RecvTimeoutError::Timeout) if cluster.has_ended() => return ExitCode::FAILURE,
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    match cluster.stop() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn end_on_signals(reasons: Sender<()>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for _ in signals.forever() {
            let _ = reasons.send(());
        }
    })?;
    Ok(())
}

fn end_on_close(reasons: Sender<()>) {
    std::thread::spawn(move || {
        // Nothing more is ever written; an error says as clearly as the end that the owner is gone.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = reasons.send(());
    });
}

fn report(report: &Report) {
    // An owner that is gone hears nothing, and its closed pipe ends us anyway.
    if let Ok(line) = serde_json::to_string(report) {
        let mut out = io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
