//! The template that test servers are copied from, and the directory all of them live in.
//! Parallel test programs share both, so making the template is under a lock that all take.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use tempfile::TempDir;
use walcast_cluster::{Binaries, Cluster, DirLock, Patience};

/// A first initdb on a cold, busy machine takes seconds; several test programs may queue for it.
const MAKING_PATIENCE: Patience = Patience::Any(Duration::from_secs(120));
/// A directory this old whose lock is free belongs to a test program that was killed.
const ABANDONED_AFTER: Duration = Duration::from_secs(600);
const PREFIX: &str = "pg-";

/// A new empty directory for one server.
pub(super) fn new_directory() -> anyhow::Result<TempDir> {
    let base = base()?;
    sweep(&base);
    // The server's own user must get through it; what lies inside is closed.
    let open = fs::Permissions::from_mode(0o755);
    let directory = tempfile::Builder::new().prefix(PREFIX).permissions(open).tempdir_in(&base);
    directory.with_context(|| format!("making a directory for a test server in {}", base.display()))
}

/// Puts a fresh `pgdata` into `directory`.
pub(super) fn copy_into(binaries: &Binaries, directory: &Path) -> anyhow::Result<()> {
    let template = made(binaries)?;
    let answer = Command::new("cp").arg("-a").arg(&template).arg(directory.join("pgdata")).output().context("running cp")?;
    if !answer.status.success() {
        bail!("copying {}: {}", template.display(), String::from_utf8_lossy(&answer.stderr).trim());
    }
    Ok(())
}

/// The data directory of the template, made now if this is the first test on this machine.
fn made(binaries: &Binaries) -> anyhow::Result<PathBuf> {
    let mut place = DefaultHasher::new();
    binaries.dir().hash(&mut place);
    let base = base()?;
    let home = base.join(format!("template-{}-{:08x}", binaries.version(), place.finish() as u32));
    let pgdata = home.join("pgdata");
    let _turn = DirLock::take(&base, std::process::id(), MAKING_PATIENCE)?;
    if !pgdata.join("PG_VERSION").exists() {
        Cluster::open(super::config(binaries.clone(), &home)).context("making the template of the test servers")?;
    }
    Ok(pgdata)
}

/// One directory per user, since files of another could not be removed.
fn base() -> anyhow::Result<PathBuf> {
    let user = fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    let name = user.map_or_else(|_| "walcast-testkit".to_owned(), |uid| format!("walcast-testkit-{uid}"));
    let base = std::env::temp_dir().join(name);
    fs::create_dir_all(&base).with_context(|| format!("making {}", base.display()))?;
    fs::set_permissions(&base, fs::Permissions::from_mode(0o755)).with_context(|| format!("opening {}", base.display()))?;
    Ok(base)
}

/// Removes what killed test programs left. Best effort: another program may be sweeping too.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
        let age = entry.metadata().and_then(|meta| meta.modified()).map(|at| SystemTime::now().duration_since(at));
        let old = matches!(age, Ok(Ok(age)) if age > ABANDONED_AFTER);
        if old && DirLock::take(&entry.path(), std::process::id(), Patience::Any(Duration::ZERO)).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
