//! The peer: nginx with Nchan, one worker, in a folder of its own. Messages come in by HTTP and go out by WebSocket.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, bail};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use walcast_testkit::wait;

use crate::stage::DEADLINE;

const PROGRAMS: [&str; 3] = ["/usr/sbin/nginx", "/usr/local/sbin/nginx", "/usr/bin/nginx"];
const MODULES: [&str; 2] = ["/usr/lib/nginx/modules/ngx_nchan_module.so", "/usr/lib64/nginx/modules/ngx_nchan_module.so"];

/// Ends with this value.
pub struct Nchan {
    _child: Child,
    _folder: TempDir,
    pub address: String,
    /// Of the one worker.
    pub worker: u32,
}

impl Nchan {
    /// None where it is not installed.
    pub async fn start(connections: u32) -> anyhow::Result<Option<Nchan>> {
        let first = |paths: &[&str]| paths.iter().map(PathBuf::from).find(|path| path.is_file());
        let (Some(program), Some(module)) = (first(&PROGRAMS), first(&MODULES)) else { return Ok(None) };
        let folder = tempfile::tempdir()?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, configuration(&module, folder.path(), port, connections))?;
        let mut command = Command::new(&program);
        command.arg("-p").arg(folder.path()).arg("-c").arg(&file).arg("-e").arg(folder.path().join("error.log"));
        command.stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        // In the foreground as one process, so that it ends when it is killed.
        let child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        let worker = child.id().context("nginx ended at once")?;
        let address = format!("127.0.0.1:{port}");
        let answers = async || tokio::net::TcpStream::connect(&address).await.is_ok();
        if wait::until(Duration::from_secs(10).min(DEADLINE), "nginx listens", answers).await.is_err() {
            bail!("nginx: {}", std::fs::read_to_string(folder.path().join("error.log")).unwrap_or_default());
        }
        Ok(Some(Nchan { _child: child, _folder: folder, address, worker }))
    }
}

fn configuration(module: &Path, folder: &Path, port: u16, connections: u32) -> String {
    let (module, folder, most) = (module.display(), folder.display(), connections + 100);
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("  {kind}_temp_path {folder}/{kind};\n"))
        .concat();
    format!(
        "load_module {module};\ndaemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nworker_rlimit_nofile {limit};\n\
         events {{ worker_connections {most}; }}\n\
         http {{\n  access_log off;\n{temporary}  keepalive_requests 100000000;\n  tcp_nodelay on;\n\
         \x20 server {{\n    listen 127.0.0.1:{port};\n\
         \x20   location = /sub {{ nchan_subscriber websocket; nchan_channel_id bench; nchan_subscriber_first_message newest; }}\n\
         \x20   location = /pub {{ nchan_publisher http; nchan_channel_id bench; nchan_message_buffer_length 200; }}\n  }}\n}}\n",
        limit = most * 2,
    )
}
