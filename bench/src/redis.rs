//! A Redis of our own to compare with, where `redis-server` is installed. Keeps nothing on disk.

use std::{net::TcpListener, process::Stdio, time::Duration};

use anyhow::Context;
use tokio::process::{Child, Command};

use crate::{
    stage::DEADLINE,
    wire::{Wire, redis_command},
};

/// Ends with this value.
pub struct Redis {
    _child: Child,
    pub pid: u32,
    pub address: String,
}

impl Redis {
    /// None where it is not installed; that is said.
    pub async fn start() -> anyhow::Result<Option<Redis>> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true).spawn();
        let child = match spawned {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                println!("\nredis-server is not installed (apt-get install redis-server): its rows are left out");
                return Ok(None);
            }
            spawned => spawned.context("starting redis-server")?,
        };
        let pid = child.id().context("redis-server ended at once")?;
        let redis = Redis { _child: child, pid, address: format!("127.0.0.1:{port}") };
        let ping = redis_command(&[b"PING"]);
        let until = tokio::time::Instant::now() + DEADLINE;
        while !answers(&redis.address, &ping).await {
            anyhow::ensure!(tokio::time::Instant::now() < until, "redis-server does not answer");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(Some(redis))
    }
}

async fn answers(address: &str, ping: &[u8]) -> bool {
    match Wire::connect(address).await {
        Ok(mut wire) => wire.redis(ping).await.is_ok(),
        Err(_) => false,
    }
}
