//! PostgreSQL never outlives its owner, whoever of the two or three processes is killed and how.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use walcast_cluster::{Access, Binaries, Cluster, ClusterConfig, Supervised};

const PROGRAM: &str = env!("CARGO_BIN_EXE_private-postgres");

/// A `walcast dev` in small: a process that owns a supervised server.
struct Owner {
    process: Child,
    url: String,
    dir: PathBuf,
}

impl Owner {
    fn start(dir: &Path) -> Owner {
        let mut process = Command::new(PROGRAM).arg(dir).process_group(0).stdout(Stdio::piped()).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut url).unwrap();
        assert!(url.starts_with("postgres://postgres:"), "{url}");
        Owner { process, url: url.trim().to_owned(), dir: dir.canonicalize().unwrap() }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    fn supervisor(&self) -> Pid {
        children(self.pid()).into_iter().find(|pid| command(*pid).contains("supervise")).expect("a supervisor runs")
    }

    fn server_processes(&self) -> Vec<Pid> {
        let pgdata = self.dir.join("pgdata");
        let cwd = |pid: &Pid| fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        all_processes().into_iter().filter(|pid| cwd(pid) == pgdata).collect()
    }

    fn wait_until_no_server_is_left(&self) {
        let started = Instant::now();
        while !self.server_processes().is_empty() {
            assert!(started.elapsed() < Duration::from_secs(30), "PostgreSQL outlived its owner: {:?}", self.server_processes());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn all_processes() -> Vec<Pid> {
    let entries = fs::read_dir("/proc").expect("these tests look at processes through /proc");
    entries.flatten().filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

fn children(parent: Pid) -> Vec<Pid> {
    let parent = format!("PPid:\t{parent}\n");
    let is_child = |pid: &Pid| fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| status.contains(&parent));
    all_processes().into_iter().filter(is_child).collect()
}

fn command(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
}

#[test]
fn kill_9_of_the_owner_leaves_no_postgres_and_the_next_owner_gets_the_data() {
    let home = tempfile::tempdir().unwrap();
    let first = Owner::start(&home.path().join("dev"));
    assert!(!first.server_processes().is_empty());
    kill_process(first.pid(), Signal::KILL).unwrap();
    // At once, while the first one's supervisor may still be stopping: the second waits its turn.
    let mut gone = first;
    gone.process.wait().unwrap();
    let second = Owner::start(&home.path().join("dev"));
    assert_eq!(second.url, gone.url, "port and password are kept");
    assert!(fs::read_to_string(second.dir.join("server.log")).unwrap().contains("database system was shut down at"));
}

#[test]
fn ctrl_c_reaches_the_owner_alone_and_the_server_still_stops_in_order() {
    let home = tempfile::tempdir().unwrap();
    let owner = Owner::start(&home.path().join("dev"));
    // What a terminal does: the signal goes to the whole foreground group.
    kill_process_group(owner.pid(), Signal::INT).unwrap();
    owner.wait_until_no_server_is_left();
    let log = fs::read_to_string(owner.dir.join("server.log")).unwrap();
    assert!(log.contains("received fast shutdown request") && log.contains("database system is shut down"), "{log}");
}

#[test]
fn kill_9_of_the_supervisor_leaves_no_postgres_and_the_owner_notices() {
    let home = tempfile::tempdir().unwrap();
    let mut owner = Owner::start(&home.path().join("dev"));
    kill_process(owner.supervisor(), Signal::KILL).unwrap();
    owner.wait_until_no_server_is_left();
    assert!(!owner.process.wait().unwrap().success());
}

#[test]
fn a_server_left_over_after_everybody_else_was_killed_is_ended_by_the_next_start() {
    let home = tempfile::tempdir().unwrap();
    let owner = Owner::start(&home.path().join("dev"));
    let supervisor = owner.supervisor();
    let shells: Vec<Pid> = children(supervisor);
    let readers: Vec<Pid> =
        shells.iter().flat_map(|shell| children(*shell)).filter(|pid| command(*pid).contains("walcast-tether")).collect();
    assert!(!shells.is_empty() && !readers.is_empty());
    // Stopped first, so that it cannot act on what it sees, while its pipe to the reader stays open.
    kill_process(supervisor, Signal::STOP).unwrap();
    for pid in [readers, shells, vec![supervisor]].concat() {
        kill_process(pid, Signal::KILL).unwrap();
    }
    let left_over = owner.server_processes();
    assert!(!left_over.is_empty(), "the server runs on without anyone");
    let dir = owner.dir.clone();
    drop(owner);
    let next = Owner::start(&dir);
    assert!(next.server_processes().iter().all(|pid| !left_over.contains(pid)));
}

#[test]
fn a_terminated_supervisor_stops_the_server_in_order() {
    let home = tempfile::tempdir().unwrap();
    let owner = Owner::start(&home.path().join("dev"));
    kill_process(owner.supervisor(), Signal::TERM).unwrap();
    owner.wait_until_no_server_is_left();
    let log = fs::read_to_string(owner.dir.join("server.log")).unwrap();
    assert!(log.contains("received fast shutdown request"), "{log}");
}

#[test]
fn a_second_owner_is_refused_at_once_with_the_pid_of_the_first() {
    let home = tempfile::tempdir().unwrap();
    let owner = Owner::start(&home.path().join("dev"));
    let refused = Command::new(PROGRAM).arg(&owner.dir).output().unwrap();
    assert!(!refused.status.success());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains(&format!("in use by process {}", owner.pid())), "{said}");
}

#[test]
fn stopping_a_supervised_server_waits_until_it_is_gone() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("dev");
    let config = ClusterConfig { access: Access::Trust, ..ClusterConfig::new(Binaries::find(None).unwrap(), &dir) };
    let mut server = Supervised::spawn(Path::new(PROGRAM), &["supervise"], &config).unwrap();
    assert!(server.is_running());
    let port = server.port();
    server.stop().unwrap();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    Cluster::open(config).expect("the directory is free again");
}
