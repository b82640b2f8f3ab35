//! The file in which a running `walcast dev` keeps its addresses and keys, for `token` and `tail`. Only its owner may read it.

use std::{
    env,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevState {
    /// Where the server listens: `http://127.0.0.1:4000`.
    pub url: String,
    pub database_url: String,
    pub admin_database_url: String,
    pub anon_key: String,
    pub service_key: String,
    pub jwt_secret: String,
    pub provider: DevPerson,
    pub patient: DevPerson,
}

/// Somebody of the demo clinic.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevPerson {
    pub token: String,
    pub user_id: String,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patient_id: Option<i64>,
}

const FILE: &str = "state.json";

/// `WALCAST_DEV_DIR`, else the user's state directory; as root one that the server's own user can reach.
pub fn dev_dir(root: bool) -> PathBuf {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(directory) = named("WALCAST_DEV_DIR") {
        return directory;
    }
    if root {
        return PathBuf::from("/var/lib/walcast/dev");
    }
    let state = named("XDG_STATE_HOME").unwrap_or_else(|| named("HOME").unwrap_or_else(|| ".".into()).join(".local/state"));
    state.join("walcast/dev")
}

impl DevState {
    /// None if no `dev` has left one here.
    pub fn read(directory: &Path) -> Result<Option<DevState>, Failure> {
        let path = directory.join(FILE);
        let unreadable = |reason: String| {
            Failure::new("dev_state", format!("the state of `walcast dev` in {} cannot be read: {reason}", path.display()))
                .hint("start `walcast dev` again, which writes it anew".to_owned())
        };
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| unreadable(error.to_string())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(error.to_string())),
        }
    }

    /// Whole or not at all, and never readable by others, not even for a moment.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let new = directory.join(format!("{FILE}.{}", std::process::id()));
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        let written = file.write_all(&serde_json::to_vec_pretty(self)?).and_then(|()| file.sync_all());
        written.and_then(|()| std::fs::rename(&new, directory.join(FILE))).inspect_err(|_| drop(std::fs::remove_file(&new)))
    }

    /// When `dev` ends, so that nobody takes a dead server for a running one.
    pub fn remove(directory: &Path) -> io::Result<()> {
        std::fs::remove_file(directory.join(FILE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_dev_writes_only_its_owner_reads() {
        let directory = tempfile::tempdir().unwrap();
        assert!(DevState::read(directory.path()).unwrap().is_none());
        let person = DevPerson { token: "t".into(), user_id: "u".into(), name: "n".into(), patient_id: None };
        let state = DevState {
            url: "http://127.0.0.1:4000".into(),
            database_url: "d".into(),
            admin_database_url: "a".into(),
            anon_key: "k".into(),
            service_key: "s".into(),
            jwt_secret: "j".into(),
            provider: person.clone(),
            patient: DevPerson { patient_id: Some(7), ..person },
        };
        state.write(directory.path()).unwrap();
        assert!(DevState::read(directory.path()).unwrap() == Some(state));
        let mode = std::fs::metadata(directory.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        DevState::remove(directory.path()).unwrap();
        assert!(DevState::read(directory.path()).unwrap().is_none());
    }
}
