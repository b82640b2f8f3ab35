//! The directory of `walcast dev`: one `dev` at a time in it, its secrets, its data.
//! Held open while `dev` runs. The lock is the kernel's, so it goes with the process, however that ends.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rand::Rng;
use walcast_cluster::{ClusterError, DirLock, Patience};

use super::cluster_failure;
use crate::{
    dev_state::{DevState, dev_dir},
    failure::Failure,
};

pub struct Home {
    dir: PathBuf,
    _lock: DirLock,
}

impl Home {
    /// Makes the directory where there is none. Whoever is here already keeps it, and is named.
    pub fn open() -> Result<Home, Failure> {
        let dir = dev_dir(rustix::process::geteuid().is_root());
        make(&dir)?;
        let lock = DirLock::take(&dir, std::process::id(), Patience::Any(Duration::ZERO)).map_err(|error| match error {
            ClusterError::Locked { pid, .. } => somebody_is_here(&dir, &pid),
            other => cluster_failure(other),
        })?;
        // Left by one that was killed: nobody shall take it for a running server's.
        let _ = DevState::remove(&dir);
        Ok(Home { dir, _lock: lock })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// PostgreSQL's own folder.
    pub fn postgres(&self) -> PathBuf {
        self.dir.join("postgres")
    }

    pub fn log_file(&self) -> PathBuf {
        self.postgres().join("server.log")
    }

    /// Is this the first start, or the first after a reset?
    pub fn is_new(&self) -> bool {
        !self.postgres().join("pgdata").exists()
    }

    /// Throws the database away. Keys stay, so that what an application was given still works.
    pub fn reset(&self) -> Result<(), Failure> {
        let data = self.postgres();
        if !data.exists() {
            return Ok(());
        }
        // The supervisor of a `dev` that was killed may still be stopping its server.
        let patience = Patience::ForTheDead(Duration::from_secs(30));
        let lock = DirLock::take(&data, std::process::id(), patience).map_err(cluster_failure)?;
        let removed = fs::remove_dir_all(&data).map_err(|error| file_failure("removing", &data, &error));
        drop(lock);
        removed
    }

    /// Made once, kept 0600, used again: tokens and passwords outlive a restart.
    pub fn secret(&self, name: &str) -> Result<String, Failure> {
        use std::{io::Write, os::unix::fs::OpenOptionsExt};
        let path = self.dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) if text.trim().len() >= 32 => return Ok(text.trim().to_owned()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(file_failure("reading", &path, &error)),
        }
        let secret = format!("{:032x}{:032x}", rand::rng().random::<u128>(), rand::rng().random::<u128>());
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(secret.as_bytes())).map_err(|error| file_failure("writing", &path, &error))?;
        Ok(secret)
    }

    pub fn write(&self, state: &DevState) -> Result<(), Failure> {
        state.write(&self.dir).map_err(|error| file_failure("writing the state to", &self.dir, &error))
    }

    pub fn remove_state(&self) {
        let _ = DevState::remove(&self.dir);
    }
}

/// The directory is ours; PostgreSQL's folder in it belongs to the user that runs it, who must be able to pass.
fn make(dir: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(dir).map_err(|error| file_failure("making", dir, &error))?;
    let mode = if rustix::process::geteuid().is_root() { 0o711 } else { 0o700 };
    fs::set_permissions(dir, fs::Permissions::from_mode(mode)).map_err(|error| file_failure("protecting", dir, &error))
}

fn somebody_is_here(dir: &Path, pid: &str) -> Failure {
    let page = match DevState::read(dir) {
        Ok(Some(state)) => format!("its page is {}/demo; ", state.url),
        _ => String::new(),
    };
    Failure::new("already_running", format!("`walcast dev` already runs in {} as process {pid}", dir.display()))
        .hint(format!("{page}end it with `kill {pid}`, or start another: WALCAST_DEV_DIR=/tmp/walcast-2 walcast dev --port 4001"))
}

pub fn file_failure(doing: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new("files", format!("{doing} {} failed: {error}", path.display()))
        .hint("choose another directory with WALCAST_DEV_DIR".to_owned())
}
