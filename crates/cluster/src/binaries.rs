//! Finds the directory that holds `postgres` and `initdb`. Called once by whoever opens a
//! cluster. Never takes a version below the oldest we support, and never installs by itself.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::ClusterError;

pub const OLDEST_MAJOR: u32 = 15;

/// The environment variable that names the directory.
const ENV: &str = "WALCAST_PG_BIN";

/// Where packagers put servers. A `*` stands for one version.
const USUAL_PLACES: &[&str] = &[
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
];

/// A directory of server binaries whose version was asked and found good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    dir: PathBuf,
    major: u32,
    version: String,
}

impl Binaries {
    /// The directory given, else the environment, `PATH`, `pg_config`, the usual places.
    ///
    /// What the user named is used or refused, never silently passed over for something else.
    pub fn find(explicit: Option<&Path>) -> Result<Binaries, ClusterError> {
        if let Some(dir) = explicit {
            return Binaries::at(dir);
        }
        if let Some(dir) = env::var_os(ENV).filter(|dir| !dir.is_empty()) {
            return Binaries::at(Path::new(&dir));
        }
        Binaries::first_of(on_path().into_iter().chain(from_pg_config()).chain(usual_places()))
    }

    /// Exactly this directory.
    pub fn at(dir: &Path) -> Result<Binaries, ClusterError> {
        let bad = |reason: String| ClusterError::BadBinaries { dir: dir.to_path_buf(), reason };
        for program in ["postgres", "initdb"] {
            if !dir.join(program).is_file() {
                return Err(bad(format!("`{program}` is missing")));
            }
        }
        let answer = Command::new(dir.join("postgres"))
            .arg("--version")
            .output()
            .map_err(|error| bad(format!("`postgres --version` does not run: {error}")))?;
        let text = String::from_utf8_lossy(&answer.stdout);
        let Some((major, version)) = parse_version(&text) else {
            let said = format!("{}{}", text.trim(), String::from_utf8_lossy(&answer.stderr).trim());
            return Err(bad(format!("`postgres --version` said \"{said}\"")));
        };
        if major < OLDEST_MAJOR {
            return Err(bad(format!("version {version} is older than {OLDEST_MAJOR}")));
        }
        let dir = fs::canonicalize(dir).map_err(ClusterError::io("resolving", dir))?;
        Ok(Binaries { dir, major, version })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// 15, 16, …
    pub fn major(&self) -> u32 {
        self.major
    }

    /// As PostgreSQL says it, `15.18`.
    pub fn version(&self) -> &str {
        &self.version
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn first_of(places: impl Iterator<Item = PathBuf>) -> Result<Binaries, ClusterError> {
        let mut refused = Vec::new();
        for dir in places {
            match Binaries::at(&dir) {
                Ok(found) => return Ok(found),
                Err(ClusterError::BadBinaries { dir, reason }) => refused.push(format!("{}: {reason}", dir.display())),
                Err(other) => refused.push(other.to_string()),
            }
        }
        let tried = if refused.is_empty() { "PATH and the usual places hold none".to_owned() } else { refused.join("; ") };
        Err(ClusterError::NotFound { oldest: OLDEST_MAJOR, tried })
    }
}

fn on_path() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).filter(|dir| dir.join("postgres").is_file() && dir.join("initdb").is_file()).collect()
}

fn from_pg_config() -> Option<PathBuf> {
    let answer = Command::new("pg_config").arg("--bindir").output().ok().filter(|answer| answer.status.success())?;
    let dir = PathBuf::from(String::from_utf8_lossy(&answer.stdout).trim());
    // Client packages ship a pg_config too; then the server is simply not here.
    dir.join("initdb").is_file().then_some(dir)
}

/// Newest version first, whatever place it lies in.
fn usual_places() -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = USUAL_PLACES.iter().flat_map(|pattern| matching(pattern)).collect();
    found.retain(|(_, dir)| dir.join("initdb").is_file());
    found.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
    found.into_iter().map(|(_, dir)| dir).collect()
}

/// The directories that a pattern with at most one `*` names, each with the number the `*` stood for.
fn matching(pattern: &str) -> Vec<(u32, PathBuf)> {
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![(0, PathBuf::from(pattern))];
    };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.parse().ok()?;
            Some((version, PathBuf::from(format!("{parent}/{name}{after}"))))
        })
        .collect()
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, also `19devel`, `18beta1`.
fn parse_version(text: &str) -> Option<(u32, String)> {
    let version = text.strip_prefix("postgres (PostgreSQL) ")?.split_whitespace().next()?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    Some((digits.parse().ok()?, version.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_packagers_write_them() {
        let check = |text: &str, wanted: Option<(u32, &str)>| {
            assert_eq!(parse_version(text), wanted.map(|(major, all)| (major, all.to_owned())), "{text}");
        };
        check("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some((15, "15.18")));
        check("postgres (PostgreSQL) 18.4\n", Some((18, "18.4")));
        check("postgres (PostgreSQL) 19devel\n", Some((19, "19devel")));
        check("postgres (EnterpriseDB) 15.1", None);
        check("", None);
    }

    #[test]
    fn a_named_directory_without_a_server_is_refused_not_passed_over() {
        let empty = tempfile::tempdir().unwrap();
        let error = Binaries::find(Some(empty.path())).unwrap_err();
        assert!(matches!(error, ClusterError::BadBinaries { .. }), "{error}");
    }

    #[test]
    fn a_server_that_is_too_old_is_refused_with_its_version() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        for program in ["postgres", "initdb"] {
            let path = dir.path().join(program);
            fs::write(&path, "#!/bin/sh\necho 'postgres (PostgreSQL) 14.23'\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let error = Binaries::at(dir.path()).unwrap_err().to_string();
        assert!(error.contains("14.23 is older than 15"), "{error}");
    }

    #[test]
    fn the_newest_of_the_usual_places_comes_first() {
        let root = tempfile::tempdir().unwrap();
        for name in ["pg-9", "pg-17", "pg-15", "pg-x"] {
            fs::create_dir_all(root.path().join(name).join("bin")).unwrap();
        }
        let mut found = matching(&format!("{}/pg-*/bin", root.path().display()));
        found.sort_by_key(|(version, _)| std::cmp::Reverse(*version));
        assert_eq!(found.iter().map(|(version, _)| *version).collect::<Vec<_>>(), [17, 15, 9]);
    }
}
