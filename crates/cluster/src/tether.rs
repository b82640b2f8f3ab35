//! Ties a server to the process that started it: when that process ends, even by kill -9, the
//! server ends. Made of `sh` and a pipe, which every Unix has; a death signal from the kernel
//! would be Linux only, would watch one thread instead of the process, and would need unsafe code.
//!
//! The shell starts the server and a reader of our pipe. The write end is ours alone, so end of
//! file means that we are gone, and the reader then stops the server. The shell ends with the server.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::service_user::ServiceUser;

// Background commands of a shell get /dev/null as stdin, hence the detour over descriptor 3.
// SIGQUIT is PostgreSQL's immediate shutdown: it needs no cooperation from clients.
const SCRIPT: &str = r#"
exec 3<&0 </dev/null
"$@" 3<&- &
server=$!
( while read -r _ <&3; do :; done; kill -s QUIT "$server" ) >/dev/null 2>&1 &
reader=$!
exec 3<&-
wait "$server"
code=$?
kill -s KILL "$reader" 2>/dev/null
wait "$reader" 2>/dev/null
exit "$code"
"#;

/// The shell between us and the server. Dropping it stops the server at once.
#[derive(Debug)]
pub(crate) struct Tether {
    shell: Child,
}

impl Tether {
    /// Starts `server` as `user`, in a process group of its own so that Ctrl-C does not reach it.
    pub(crate) fn spawn(user: &ServiceUser, server: &Command, log: &File) -> io::Result<Tether> {
        let shell = user
            .command(Path::new("/bin/sh"))
            .args(["-c", SCRIPT, "walcast-tether"])
            .arg(server.get_program())
            .args(server.get_args())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()?;
        Ok(Tether { shell })
    }

    /// Has the server ended, and how?
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.shell.try_wait()
    }

    /// Lets go of the pipe, which stops the server, and waits for it.
    pub(crate) fn cut(&mut self) -> io::Result<ExitStatus> {
        drop(self.shell.stdin.take());
        self.shell.wait()
    }
}

impl Drop for Tether {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure; a server that survives this is found by the next start.
        let _ = self.cut();
    }
}
