//! One PostgreSQL of our own in one directory: made on first use, started, stopped, killed.
//! Called by the supervisor of `walcast dev` and by the tests. Listens on 127.0.0.1 only, has no
//! Unix socket, and never outlives its `Cluster`, nor the process that holds it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::binaries::Binaries;
use crate::error::ClusterError;
use crate::lock::{DirLock, Patience};
use crate::postmaster::{self, Postmaster};
use crate::service_user::ServiceUser;
use crate::tether::Tether;
use crate::{passphrase, port};

/// Crash recovery may take a while; a start that takes longer than this is broken.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long `stop` lets transactions roll back and the last checkpoint be written.
const FAST_DEADLINE: Duration = Duration::from_secs(10);
/// PostgreSQL itself kills what has not gone 5 s after an immediate stop.
const IMMEDIATE_DEADLINE: Duration = Duration::from_secs(15);
/// The supervisor of an owner that died needs both of them to stop its server.
const LOCK_PATIENCE: Patience = Patience::ForTheDead(Duration::from_secs(30));
const POLL: Duration = Duration::from_millis(10);
const PORT_ATTEMPTS: usize = 5;

/// Who may connect from the loopback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Anyone. For tests.
    Trust,
    /// Whoever has the generated password (SCRAM), kept in a 0600 file beside the data.
    Password,
}

/// What a power cut may cost right after the directory was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// initdb waits for the disk.
    Synced,
    /// It does not; saves a second or more. For tests.
    Unsynced,
}

#[derive(Debug, Clone)]
pub struct ClusterConfig {
    pub binaries: Binaries,
    /// Everything of this cluster lies here: `pgdata`, `server.log`, and the files `port`, `password`, `lock`.
    pub data_dir: PathBuf,
    /// `None`: chosen once and kept; a new one if a stranger took it meanwhile.
    pub port: Option<u16>,
    /// Server settings, as in postgresql.conf, beside `wal_level=logical`; of two equal names the later
    /// wins, and `ALTER SYSTEM` wins over both.
    pub settings: Vec<(String, String)>,
    pub superuser: String,
    pub access: Access,
    pub durability: Durability,
    /// The process that others are told about when the directory is locked.
    pub owner_pid: u32,
}

impl ClusterConfig {
    /// Password, synced, a kept port, a bound on what a forgotten slot holds back: what `walcast dev` wants.
    pub fn new(binaries: Binaries, data_dir: impl Into<PathBuf>) -> ClusterConfig {
        ClusterConfig {
            binaries,
            data_dir: data_dir.into(),
            port: None,
            settings: vec![("max_slot_wal_keep_size".to_owned(), "2GB".to_owned())],
            superuser: "postgres".to_owned(),
            access: Access::Password,
            durability: Durability::Synced,
            owner_pid: std::process::id(),
        }
    }
}

#[derive(Debug)]
pub struct Cluster {
    config: ClusterConfig,
    /// Canonical, since the kernel names a process's directory that way.
    dir: PathBuf,
    user: ServiceUser,
    port: u16,
    password: Option<String>,
    /// Before the lock: fields drop in order, and the lock must go last.
    tether: Option<Tether>,
    _lock: DirLock,
}

impl Cluster {
    /// Locks the directory and makes the cluster if there is none. Starts nothing.
    pub fn open(config: ClusterConfig) -> Result<Cluster, ClusterError> {
        let user = ServiceUser::choose()?;
        let dir = prepare_dir(&config.data_dir, &user)?;
        let lock = DirLock::take(&dir, config.owner_pid, LOCK_PATIENCE)?;
        let port = match config.port {
            Some(port) => port,
            None => kept_or_new_port(&dir)?,
        };
        let mut cluster = Cluster { config, dir, user, port, password: None, tether: None, _lock: lock };
        if !cluster.pgdata().join("PG_VERSION").exists() {
            cluster.initdb()?;
        }
        cluster.check_version()?;
        cluster.password = cluster.read_password()?;
        Ok(cluster)
    }

    /// Starts the server and returns when it accepts connections. A running one is left alone.
    pub fn start(&mut self) -> Result<(), ClusterError> {
        if self.is_running() {
            return Ok(());
        }
        self.tether = None;
        self.clear_leftover()?;
        self.write_settings()?;
        for _ in 1..PORT_ATTEMPTS {
            match self.start_once() {
                Err(ClusterError::PortTaken { .. }) if self.config.port.is_none() => {
                    self.port = port::choose()?;
                    port::keep(&self.dir.join("port"), self.port)?;
                }
                other => return other,
            }
        }
        self.start_once()
    }

    /// Rolls back what is open, writes a checkpoint, ends; if that takes too long, ends at once.
    pub fn stop(&mut self) -> Result<(), ClusterError> {
        if self.end(Signal::INT, FAST_DEADLINE).is_err() {
            return self.stop_immediate();
        }
        Ok(())
    }

    /// Ends at once, as a power cut would, but orderly for the processes: the next start recovers.
    pub fn stop_immediate(&mut self) -> Result<(), ClusterError> {
        self.end(Signal::QUIT, IMMEDIATE_DEADLINE)
    }

    /// kill -9 of the postmaster; returns when none of its children is left either.
    pub fn kill9(&mut self) -> Result<(), ClusterError> {
        if self.running().is_none() {
            return Err(ClusterError::NotRunning);
        }
        self.end(Signal::KILL, IMMEDIATE_DEADLINE)
    }

    pub fn restart(&mut self) -> Result<(), ClusterError> {
        self.stop()?;
        self.start()
    }

    pub fn is_running(&self) -> bool {
        self.tether.is_some() && self.running().is_some_and(|_| postmaster::says_ready(&self.pgdata()))
    }

    /// Did a server that we started end by itself?
    pub fn has_ended(&mut self) -> bool {
        self.tether.as_mut().is_some_and(|tether| !matches!(tether.ended(), Ok(None)))
    }

    /// For the superuser and database `postgres`.
    pub fn url(&self) -> String {
        self.url_as(&self.config.superuser, self.password.as_deref(), "postgres")
    }

    /// For another role. Names and passwords go in as they are: ours need no escaping.
    pub fn url_as(&self, role: &str, password: Option<&str>, database: &str) -> String {
        let secret = password.map(|password| format!(":{password}")).unwrap_or_default();
        format!("postgres://{role}{secret}@127.0.0.1:{}/{database}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The superuser's, where one is asked for.
    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    pub fn binaries(&self) -> &Binaries {
        &self.config.binaries
    }

    pub fn log_file(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    pub fn pgdata(&self) -> PathBuf {
        self.dir.join("pgdata")
    }

    /// The postmaster's process number.
    pub fn pid(&self) -> Option<i32> {
        self.running().map(Postmaster::pid)
    }

    fn running(&self) -> Option<Postmaster> {
        Postmaster::of(&self.pgdata())
    }

    /// Into a directory beside, renamed when complete: a broken attempt is never taken for a cluster.
    fn initdb(&self) -> Result<(), ClusterError> {
        let fresh = self.dir.join("pgdata.new");
        if fresh.exists() {
            fs::remove_dir_all(&fresh).map_err(ClusterError::io("removing", &fresh))?;
        }
        let mut command = self.user.command(&self.config.binaries.program("initdb"));
        command.arg("-D").arg(&fresh).args(["-U", &self.config.superuser, "-E", "UTF8", "--locale=C.UTF-8"]);
        if self.config.durability == Durability::Unsynced {
            command.arg("--no-sync");
        }
        let pwfile = self.dir.join("password.new");
        match self.config.access {
            Access::Trust => {
                command.args(["-A", "trust"]);
            }
            Access::Password => {
                let password = passphrase::generate()?;
                passphrase::write_secret(&pwfile, &password)?;
                self.user.own(&pwfile)?;
                passphrase::write_secret(&self.dir.join("password"), &password)?;
                command.args(["-A", "scram-sha-256"]).arg(format!("--pwfile={}", pwfile.display()));
            }
        }
        let program = self.config.binaries.program("initdb");
        let answer = command.output().map_err(ClusterError::io("running", &program))?;
        let _ = fs::remove_file(&pwfile);
        if !answer.status.success() {
            let output = format!("{}{}", String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr));
            return Err(ClusterError::Initdb { output: output.trim().to_owned() });
        }
        include_our_settings(&fresh)?;
        fs::rename(&fresh, self.pgdata()).map_err(ClusterError::io("renaming", &fresh))
    }

    fn check_version(&self) -> Result<(), ClusterError> {
        let path = self.pgdata().join("PG_VERSION");
        let made_by = fs::read_to_string(&path).map_err(ClusterError::io("reading", &path))?.trim().to_owned();
        let binaries = self.config.binaries.major();
        if made_by == binaries.to_string() {
            return Ok(());
        }
        Err(ClusterError::VersionMismatch { data: self.pgdata(), made_by, binaries })
    }

    fn read_password(&self) -> Result<Option<String>, ClusterError> {
        if self.config.access == Access::Trust {
            return Ok(None);
        }
        let path = self.dir.join("password");
        let text = fs::read_to_string(&path).map_err(ClusterError::io("reading", &path))?;
        Ok(Some(text.trim().to_owned()))
    }

    /// We hold the lock, so a server that still runs here lost its owner: end it. A pid file
    /// whose process is gone or is somebody else's would keep PostgreSQL from starting: remove it.
    fn clear_leftover(&mut self) -> Result<(), ClusterError> {
        if self.running().is_some() {
            self.stop()?;
        }
        let stale = postmaster::pid_file(&self.pgdata());
        match fs::remove_file(&stale) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ClusterError::io("removing", &stale)(error)),
            _ => Ok(()),
        }
    }

    fn write_settings(&self) -> Result<(), ClusterError> {
        let path = self.pgdata().join("walcast.conf");
        let mut text = String::from("# Written at every start; what ALTER SYSTEM sets comes after it and wins.\n");
        let ours = [("wal_level", "logical")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        for (name, value) in ours.iter().chain(&self.config.settings) {
            text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        fs::write(&path, text).map_err(ClusterError::io("writing", &path))?;
        self.user.own(&path)
    }

    fn start_once(&mut self) -> Result<(), ClusterError> {
        if !port::is_free(self.port) {
            return Err(ClusterError::PortTaken { port: self.port });
        }
        let mut server = Command::new(self.config.binaries.program("postgres"));
        server.arg("-D").arg(self.pgdata());
        server.args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]);
        let log = self.new_log()?;
        let program = self.config.binaries.program("postgres");
        let mut tether = Tether::spawn(&self.user, &server, &log).map_err(ClusterError::io("starting", &program))?;
        let until = Instant::now() + START_DEADLINE;
        // A ready line can only be the new server's: the old pid file was removed.
        while !postmaster::says_ready(&self.pgdata()) {
            let ended = tether.ended().map_err(ClusterError::io("waiting for", &program))?;
            if let Some(status) = ended {
                return Err(self.start_failed(format!("it ended with {status}")));
            }
            if Instant::now() > until {
                return Err(self.start_failed(format!("not ready after {} s", START_DEADLINE.as_secs())));
            }
            std::thread::sleep(POLL);
        }
        self.tether = Some(tether);
        Ok(())
    }

    fn start_failed(&self, reason: String) -> ClusterError {
        let log = fs::read_to_string(self.log_file()).unwrap_or_default();
        // Somebody took the port between our look and the server's.
        if log.contains("could not create any TCP/IP sockets") {
            return ClusterError::PortTaken { port: self.port };
        }
        let lines: Vec<&str> = log.lines().collect();
        ClusterError::Start { reason, log: lines[lines.len().saturating_sub(15)..].join("\n") }
    }

    /// One log per life of the server, so that it cannot grow over the years.
    fn new_log(&self) -> Result<File, ClusterError> {
        let path = self.log_file();
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let log = options.open(&path).map_err(ClusterError::io("opening", &path))?;
        log.set_len(0).map_err(ClusterError::io("emptying", &path))?;
        Ok(log)
    }

    fn end(&mut self, signal: Signal, patience: Duration) -> Result<(), ClusterError> {
        if let Some(server) = self.running() {
            server.signal(signal);
            let until = Instant::now() + patience;
            while server.is_alive() || self.has_processes() {
                if Instant::now() > until {
                    return Err(ClusterError::Stop { pid: server.pid(), seconds: patience.as_secs(), log: self.log_file() });
                }
                std::thread::sleep(POLL);
            }
        }
        self.tether = None;
        Ok(())
    }

    fn has_processes(&self) -> bool {
        postmaster::processes_in(&self.pgdata()).is_some_and(|pids| !pids.is_empty())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The data may be thrown away next, so no server process may be left in them.
        let _ = self.stop_immediate();
    }
}

/// Makes the directory, gives it to the service user, and closes it to everyone else.
fn prepare_dir(wanted: &Path, user: &ServiceUser) -> Result<PathBuf, ClusterError> {
    fs::create_dir_all(wanted).map_err(ClusterError::io("making", wanted))?;
    let dir = fs::canonicalize(wanted).map_err(ClusterError::io("resolving", wanted))?;
    user.check_reach(&dir)?;
    user.own(&dir)?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).map_err(ClusterError::io("closing", &dir))?;
    Ok(dir)
}

fn kept_or_new_port(dir: &Path) -> Result<u16, ClusterError> {
    let file = dir.join("port");
    if let Some(port) = port::kept(&file) {
        return Ok(port);
    }
    let port = port::choose()?;
    port::keep(&file, port)?;
    Ok(port)
}

fn include_our_settings(pgdata: &Path) -> Result<(), ClusterError> {
    let path = pgdata.join("postgresql.conf");
    OpenOptions::new()
        .append(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "\ninclude_if_exists = 'walcast.conf'"))
        .map_err(ClusterError::io("writing", &path))
}
