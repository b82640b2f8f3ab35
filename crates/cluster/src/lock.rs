//! One owner for a directory, across processes. The lock is the kernel's: it goes with its
//! process, however that ends, so a lock file that lies around is never in the way.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::error::ClusterError;

const POLL: Duration = Duration::from_millis(25);

/// How long one waits for a lock that another holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// This long, whoever holds it. For short turns.
    Any(Duration),
    /// This long if the named owner is dead, whose supervisor is then about to let go; else not at all.
    ForTheDead(Duration),
}

/// Held until dropped.
#[derive(Debug)]
pub struct DirLock {
    file: File,
}

impl DirLock {
    /// Takes the lock of `dir`. `owner` is the process that a refused one is told about.
    pub fn take(dir: &Path, owner: u32, patience: Patience) -> Result<DirLock, ClusterError> {
        let path = dir.join("lock");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut lock = DirLock { file: options.open(&path).map_err(ClusterError::io("opening", &path))? };
        let started = Instant::now();
        loop {
            match flock(&lock.file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) => {
                    let holder = lock.owner().map_err(ClusterError::io("reading", &path))?;
                    if started.elapsed() >= patience.with(&holder) {
                        return Err(ClusterError::Locked { dir: dir.to_path_buf(), pid: holder });
                    }
                    std::thread::sleep(POLL);
                }
                Err(Errno::INTR) => {}
                Err(other) => return Err(ClusterError::io("locking", &path)(other.into())),
            }
        }
        lock.sign(owner).map_err(ClusterError::io("writing", &path))?;
        Ok(lock)
    }

    fn sign(&mut self, owner: u32) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{owner}")
    }

    fn owner(&mut self) -> std::io::Result<String> {
        let mut text = String::new();
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        Ok(text.trim().to_owned())
    }
}

impl Patience {
    fn with(self, holder: &str) -> Duration {
        match self {
            Patience::Any(time) => time,
            // Unreadable is a holder that is just signing: it lives.
            Patience::ForTheDead(time) => match holder.parse().ok().and_then(Pid::from_raw) {
                Some(pid) if test_kill_process(pid) == Err(Errno::SRCH) => time,
                _ => Duration::ZERO,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_ONCE: Patience = Patience::Any(Duration::ZERO);

    #[test]
    fn a_second_owner_is_told_who_the_first_is_and_gets_in_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = DirLock::take(dir.path(), 4711, AT_ONCE).unwrap();
        let refused = DirLock::take(dir.path(), 1, AT_ONCE).unwrap_err().to_string();
        assert!(refused.contains("in use by process 4711"), "{refused}");
        drop(first);
        DirLock::take(dir.path(), 1, AT_ONCE).unwrap();
    }

    #[test]
    fn a_living_owner_is_not_waited_for_but_a_dead_ones_supervisor_is() {
        let long = Duration::from_secs(60);
        let ourselves = std::process::id().to_string();
        assert_eq!(Patience::ForTheDead(long).with(&ourselves), Duration::ZERO);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert_eq!(Patience::ForTheDead(long).with(&child.id().to_string()), long);
    }
}
