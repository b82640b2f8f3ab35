//! What a read costs: a hit of `GET /cache` and `GET /query` over HTTP beside a GET of Redis and beside the uncached query;
//! the L2 tier beside plain SQL and Redis; how soon a commit is felt; what a write of one tenant costs the others.

mod hits;
mod invalidated;
mod l2;
mod tenants;

pub use hits::run as hits;
pub use invalidated::run as invalidated;
pub use l2::run as l2;
pub use tenants::run as tenants;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::Rng;
use tokio::task::JoinSet;

use crate::{process, wire::Wire};

/// One way of asking, over and over on some connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Speech {
    Http,
    Redis,
}

struct Load<'a> {
    address: &'a str,
    speech: Speech,
    /// One of them at random each time.
    requests: Arc<Vec<Vec<u8>>>,
    connections: usize,
    lasting: Duration,
    /// Whose CPU seconds are counted.
    pid: u32,
}

#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: f64,
    /// Of the server, for a million answers.
    cpu_s_per_million: f64,
}

impl Load<'_> {
    /// Fails on any answer that is not the hit which is measured.
    async fn measure(self) -> anyhow::Result<Rate> {
        let (over, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut wires = Vec::new();
        for _ in 0..self.connections {
            wires.push(Wire::connect(self.address).await?);
        }
        let (before, began) = (process::cpu_s(self.pid)?, Instant::now());
        let mut readers = JoinSet::new();
        for wire in wires {
            let (over, answers, requests) = (over.clone(), answers.clone(), self.requests.clone());
            readers.spawn(read(wire, self.speech, requests, over, answers));
        }
        tokio::time::sleep(self.lasting).await;
        over.store(true, Ordering::Relaxed);
        let (count, took) = (answers.load(Ordering::Relaxed) as f64, began.elapsed());
        let cpu_s = process::cpu_s(self.pid)? - before;
        while let Some(ended) = readers.join_next().await {
            ended??;
        }
        Ok(Rate { per_second: count / took.as_secs_f64(), cpu_s_per_million: cpu_s / count * 1e6 })
    }
}

async fn read(
    mut wire: Wire,
    speech: Speech,
    requests: Arc<Vec<Vec<u8>>>,
    over: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    while !over.load(Ordering::Relaxed) {
        let request = &requests[rand::rng().random_range(0..requests.len())];
        match speech {
            Speech::Http => {
                let answer = wire.http(request).await?;
                anyhow::ensure!(answer.status == 200 && answer.is_fresh_hit(), "not a hit: {}", answer.head);
            }
            Speech::Redis => {
                anyhow::ensure!(wire.redis(request).await? > 0, "redis knows no such key");
            }
        }
        answers.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
