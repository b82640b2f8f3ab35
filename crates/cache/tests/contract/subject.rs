//! A cache under test: its tiers, what is wrong with them, and what it must never answer again.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use walcast_cache::{AtLeast, Cache, CacheConfig, Hearing, L2Config, Lookup, NamespaceConfig, Precondition, Refusal};
use walcast_model::Fence;
use walcast_testkit::{Proxy, TestPostgres};

use crate::common::{
    World, key,
    l2::{node_of, patient},
    refusal, told, value, world_with,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tiers {
    Memory,
    MemoryOverTable,
    /// Memory forgets before each read.
    Table,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    Slow,
    Hang,
    Cut,
    Garbage,
    Refuse,
}

/// A tier that is wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    No,
    /// Answers what the table has, and asks no clock.
    NotJudged,
    /// Hears of commits and forgets to raise their tags.
    Deaf,
}

pub struct Subject {
    pub world: World,
    pub tiers: Tiers,
    pub fault: Fault,
    pub broken: Broken,
    pub proxy: Option<Proxy>,
    pub url: Option<String>,
    pub steps: Cell<u32>,
    /// Keys and values that no cache with this clock may ever answer as fresh again.
    pub over: RefCell<Vec<(String, String)>>,
}

pub type Outcome = Result<(), String>;

pub fn config() -> CacheConfig {
    let stale = NamespaceConfig {
        grace: Duration::from_secs(600),
        negative_ttl: Some(Duration::from_secs(60)),
        ttl_jitter: 0.0,
        ..NamespaceConfig::default()
    };
    CacheConfig { namespaces: [("stale".to_owned(), stale)].into(), max_value_bytes: 64 << 10, ..CacheConfig::default() }
}

impl Subject {
    pub async fn new(postgres: Option<&TestPostgres>, tiers: Tiers, fault: Fault, broken: Broken) -> Subject {
        let proxy = match (postgres, fault) {
            (Some(postgres), Fault::None) => (None, Some(postgres.url())),
            (Some(postgres), _) => {
                let proxy = Proxy::to(postgres.port()).await.unwrap();
                let url = postgres.url_through(&proxy);
                (Some(proxy), Some(url))
            }
            (None, _) => (None, None),
        };
        let (proxy, url) = proxy;
        let limits = match fault {
            Fault::None => patient(),
            _ => L2Config {
                read_timeout: Duration::from_millis(60),
                write_timeout: Duration::from_millis(120),
                ..L2Config::default()
            },
        };
        let world = match &url {
            Some(url) => node_of(url, limits, config()),
            None => world_with(config(), None),
        };
        Subject { world, tiers, fault, broken, proxy, url, steps: Cell::new(0), over: RefCell::default() }
    }

    /// Before each step, in turn: two steps with the fault, one without.
    pub fn disturb(&self) {
        let Some(proxy) = &self.proxy else { return };
        self.steps.set(self.steps.get() + 1);
        if self.steps.get().is_multiple_of(3) {
            return proxy.resume();
        }
        match self.fault {
            Fault::None => {}
            Fault::Slow => proxy.slow(Duration::from_millis(40)),
            Fault::Hang => proxy.pause(),
            Fault::Cut => proxy.cut(),
            Fault::Garbage => proxy.garble(),
            Fault::Refuse => proxy.refuse(),
        }
    }

    pub async fn put(&self, name: &str, text: &str, tags: &[&str], fence: Fence) -> Option<Refusal> {
        self.disturb();
        let stored = self.world.put(name, text, tags, fence);
        self.flush().await;
        refusal(&stored)
    }

    pub async fn put_from_elsewhere(&self, name: &str, text: &str) -> Option<Refusal> {
        self.disturb();
        let cache = &self.world.cache;
        let stored = cache.put_if(&key(name), value(text, &["users"]), cache.external_fence(), &Precondition::None).await;
        refusal(&stored.unwrap())
    }

    pub async fn flush(&self) {
        if let Some(l2) = self.world.cache.l2() {
            l2.flush().await;
        }
    }

    pub fn commit(&self, lsn: u64, xid: u64, tags: &[&str]) {
        let tags = if self.broken == Broken::Deaf { &[] } else { tags };
        self.world.commit(lsn, xid, tags);
    }

    pub async fn look(&self, name: &str, at_least: AtLeast) -> Lookup {
        self.disturb();
        if self.tiers == Tiers::Table {
            self.world.cache.clear_local();
        }
        self.world.cache.get(&key(name), at_least).await
    }

    pub async fn get(&self, name: &str) -> String {
        match self.broken {
            Broken::NotJudged => self.row(name).await,
            _ => told(&self.look(name, AtLeast::Any).await),
        }
    }

    /// The broken tier: the row as it is.
    pub async fn row(&self, name: &str) -> String {
        let (client, connection) = tokio_postgres::connect(self.url.as_deref().unwrap(), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let sql = "select value from walcast.cache_entries where namespace = $1 and key = $2";
        let key = key(name);
        let rows = client.query(sql, &[&key.namespace(), &key.key()]).await.unwrap();
        rows.first().map_or("miss absent".into(), |row| format!("hit {}", String::from_utf8_lossy(row.get(0))))
    }

    /// Under a fault a miss may stand for a hit, and for any other miss; a hit for nothing but itself.
    pub async fn expect(&self, name: &str, expected: &str) -> Outcome {
        let answer = self.get(name).await;
        self.compare(&format!("of {name}"), &answer, expected)
    }

    pub fn compare(&self, what: &str, answer: &str, expected: &str) -> Outcome {
        let missed = self.fault != Fault::None && answer.starts_with("miss");
        // Which reason a miss has depends on which tier was asked last.
        let same = answer == expected || (answer.starts_with("miss") && expected == "miss");
        if same || missed { Ok(()) } else { Err(format!("{what}: {answer} instead of {expected}")) }
    }

    /// From here on `text` is over.
    pub async fn ended(&self, name: &str, text: &str) -> Outcome {
        self.over.borrow_mut().push((name.to_owned(), text.to_owned()));
        self.expect(name, "miss").await
    }

    /// With all well again, and by a cache that has just begun: what was over is over.
    pub async fn nothing_comes_back(&self) -> Outcome {
        let Some(postgres) = &self.url else { return Ok(()) };
        if let Some(proxy) = &self.proxy {
            proxy.resume();
        }
        let fresh = node_of(postgres, patient(), config());
        let cache = Cache::new(config(), self.world.clock.clone(), fresh.cache.l2().cloned());
        cache.set_hearing(Hearing::Live);
        cache.set_epoch(self.world.cache.epoch());
        let over = self.over.borrow().clone();
        for (name, text) in over {
            let answer = told(&cache.get(&key(&name), AtLeast::Any).await);
            if answer == format!("hit {text}") {
                return Err(format!("{text} of {name} came back"));
            }
        }
        Ok(())
    }
}
