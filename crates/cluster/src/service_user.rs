//! Who runs the server. PostgreSQL refuses root, so root lends it `postgres`, else `nobody`;
//! anybody else runs it as himself.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::error::ClusterError;

const CANDIDATES: [&str; 2] = ["postgres", "nobody"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServiceUser {
    Ourselves,
    Lent { name: String, uid: u32, gid: u32 },
}

impl ServiceUser {
    pub(crate) fn choose() -> Result<ServiceUser, ClusterError> {
        if !rustix::process::geteuid().is_root() {
            return Ok(ServiceUser::Ourselves);
        }
        // The user must be in passwd: initdb and postgres look their own name up.
        let path = Path::new("/etc/passwd");
        let passwd = fs::read_to_string(path).map_err(ClusterError::io("reading", path))?;
        CANDIDATES.iter().find_map(|name| find(&passwd, name)).ok_or(ClusterError::NoServiceUser)
    }

    /// A command that runs as this user, from a directory it can enter.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir("/");
        if let ServiceUser::Lent { uid, gid, .. } = self {
            // The standard library drops root's supplementary groups along with the uid.
            command.uid(*uid).gid(*gid);
        }
        command
    }

    /// Hands a path over, so that the server may own it.
    pub(crate) fn own(&self, path: &Path) -> Result<(), ClusterError> {
        match self {
            ServiceUser::Ourselves => Ok(()),
            ServiceUser::Lent { uid, gid, .. } => {
                chown(path, Some(*uid), Some(*gid)).map_err(ClusterError::io("handing over", path))
            }
        }
    }

    /// Says which directory on the way keeps the user out, rather than let initdb fail without a clue.
    pub(crate) fn check_reach(&self, path: &Path) -> Result<(), ClusterError> {
        let ServiceUser::Lent { name, uid, gid } = self else { return Ok(()) };
        for dir in path.ancestors().skip(1) {
            let meta = fs::metadata(dir).map_err(ClusterError::io("looking at", dir))?;
            let bit = match () {
                _ if meta.uid() == *uid => 0o100,
                _ if meta.gid() == *gid => 0o010,
                _ => 0o001,
            };
            if meta.permissions().mode() & bit == 0 {
                return Err(ClusterError::Unreachable { user: name.clone(), dir: dir.to_path_buf() });
            }
        }
        Ok(())
    }
}

fn find(passwd: &str, name: &str) -> Option<ServiceUser> {
    let fields: Vec<&str> =
        passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields.first() == Some(&name))?;
    // Some systems write nobody's id as -2; the kernel's view of it is the two's complement.
    let id = |at: usize| fields.get(at)?.parse::<i64>().ok().map(|id| id as u32);
    Some(ServiceUser::Lent { name: name.to_owned(), uid: id(2)?, gid: id(3)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lent_user_is_read_from_passwd() {
        let passwd = "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65533:nobody:/:/bin/false\nodd:*:-2:-2::/:/bin/false\n";
        let lent = |name: &str, uid, gid| Some(ServiceUser::Lent { name: name.to_owned(), uid, gid });
        assert_eq!(find(passwd, "nobody"), lent("nobody", 65534, 65533));
        assert_eq!(find(passwd, "odd"), lent("odd", 4_294_967_294, 4_294_967_294));
        assert_eq!(find(passwd, "postgres"), None);
    }
}
