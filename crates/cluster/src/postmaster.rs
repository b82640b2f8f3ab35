//! What a data directory says about the server that runs on it, from `postmaster.pid` and the
//! process table. Never believes a file alone: a number may belong to a stranger by now.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// A running postmaster and where its data lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Postmaster {
    pid: Pid,
}

impl Postmaster {
    /// The server that runs on `pgdata` at this moment.
    pub(crate) fn of(pgdata: &Path) -> Option<Postmaster> {
        let pid = Pid::from_raw(file_lines(pgdata)?.first()?.trim().parse().ok()?)?;
        (is_alive(pid) && works_on(pid, pgdata)).then_some(Postmaster { pid })
    }

    pub(crate) fn pid(self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) fn is_alive(self) -> bool {
        is_alive(self.pid)
    }

    /// A server that has just gone is no error: gone is what the caller wanted.
    pub(crate) fn signal(self, signal: Signal) {
        let _ = kill_process(self.pid, signal);
    }
}

/// Is the server on `pgdata` ready for connections? The eighth line says so.
pub(crate) fn says_ready(pgdata: &Path) -> bool {
    file_lines(pgdata).is_some_and(|lines| lines.get(7).is_some_and(|status| status.trim() == "ready"))
}

/// Every process that works in `pgdata`, backends and orphans included; `None` where the system cannot tell.
pub(crate) fn processes_in(pgdata: &Path) -> Option<Vec<i32>> {
    let entries = fs::read_dir("/proc").ok()?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    Some(pids.filter(|pid| fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == pgdata)).collect())
}

pub(crate) fn pid_file(pgdata: &Path) -> PathBuf {
    pgdata.join("postmaster.pid")
}

fn file_lines(pgdata: &Path) -> Option<Vec<String>> {
    Some(fs::read_to_string(pid_file(pgdata)).ok()?.lines().map(str::to_owned).collect())
}

fn is_alive(pid: Pid) -> bool {
    match test_kill_process(pid) {
        Ok(()) => !is_zombie(pid),
        Err(error) => error == rustix::io::Errno::PERM,
    }
}

/// A killed process whose parent has not looked yet still has its number, but runs no more.
fn is_zombie(pid: Pid) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The name in parentheses may itself hold spaces and parentheses.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}

/// A postmaster works in its data directory. Where there is no /proc, its name has to do.
fn works_on(pid: Pid, pgdata: &Path) -> bool {
    if Path::new("/proc/self/cwd").exists() {
        return fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == pgdata);
    }
    let answer = Command::new("ps").args(["-o", "command=", "-p", &pid.to_string()]).output();
    answer.is_ok_and(|answer| String::from_utf8_lossy(&answer.stdout).contains("postgres"))
}
