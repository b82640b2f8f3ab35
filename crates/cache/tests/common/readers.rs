//! Readers who compute behind a gate, and are counted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Semaphore, task::JoinHandle};
use walcast_cache::{Answer, Cache, ComputeError, ComputeOptions, Computed};
use walcast_model::Fence;

use super::{computed, key};

pub type Outcome = Result<Answer, ComputeError<String>>;

/// Computations that wait until the test lets them go on, and are counted.
#[derive(Clone)]
pub struct Gate {
    pub begun: Arc<AtomicUsize>,
    pub go: Arc<Semaphore>,
}

impl Gate {
    pub fn new() -> Gate {
        Gate { begun: Arc::default(), go: Arc::new(Semaphore::new(0)) }
    }

    pub async fn pass(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
        self.go.acquire().await.unwrap().forget();
    }

    pub fn begun(&self) -> usize {
        self.begun.load(Ordering::SeqCst)
    }
}

pub fn reader(
    cache: &Cache,
    gate: &Gate,
    options: ComputeOptions,
    answer: impl Fn() -> Result<Computed, String> + Send + Sync + 'static,
) -> JoinHandle<Outcome> {
    reader_of("graceful/7", cache, gate, options, answer)
}

pub fn reader_of(
    name: &str,
    cache: &Cache,
    gate: &Gate,
    options: ComputeOptions,
    answer: impl Fn() -> Result<Computed, String> + Send + Sync + 'static,
) -> JoinHandle<Outcome> {
    let (cache, gate, key) = (cache.clone(), gate.clone(), key(name));
    tokio::spawn(async move {
        let answer = Arc::new(answer);
        let compute = move || {
            let (gate, answer) = (gate.clone(), answer.clone());
            async move {
                gate.pass().await;
                answer()
            }
        };
        cache.get_or_compute(&key, &options, compute).await
    })
}

pub fn fresh(text: &'static str, fence: Fence) -> impl Fn() -> Result<Computed, String> + Send + Sync + Clone + 'static {
    move || Ok(computed(text, &["patients:id=7"], fence.clone()))
}

pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap_or_else(|_| panic!("{what} did not happen"));
}

pub fn text(outcome: &Outcome) -> String {
    String::from_utf8_lossy(&outcome.as_ref().unwrap().entry.value).into_owned()
}

pub fn options() -> ComputeOptions {
    ComputeOptions { timeout: Duration::from_secs(20), ..ComputeOptions::default() }
}
