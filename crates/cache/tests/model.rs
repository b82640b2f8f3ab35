//! The cache against a reference that is obviously right: random reads, fills, commits, rollbacks, invalidations, crashes,
//! restarts and lost connections, thousands of steps a run. A fresh answer may never lack a commit that anybody was told
//! of, and when all has come to rest it must be what the database says.
//!
//! Three caches with one rule taken out run through the same steps. Each must be caught, or the test would prove nothing.

#[path = "model/database.rs"]
mod database;

use std::{sync::Arc, time::Duration};

use database::{Database, KEYS, tag_of};
use rand::{Rng, SeedableRng, rngs::StdRng};
use walcast_cache::{AtLeast, Cache, CacheConfig, ComputeOptions, Computed, Hearing, L2, L2Config, Lookup, NewValue};
use walcast_model::{CacheKey, Epoch, Fence, Floor, Lsn, SlotImage, Snapshot, Stamp, Tag, TagClock};
use walcast_pg::{ConnectConfig, Pool};
use walcast_testkit::TestPostgres;

const STEPS: usize = 6_000;
const SEEDS: u64 = 40;
const SLOTS: usize = 1 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// As it is built.
    Fences,
    /// Control: a value is stored as of the moment it is stored.
    NoFence,
    /// Control: a value is stored as of the LSN that was written when it was read.
    ByLsn,
    /// Control: after a crash things go on as before.
    NoFloorMove,
}

/// A value on its way into the cache.
struct Fill {
    key: usize,
    fence: Fence,
    read: Option<(u64, Lsn)>,
}

struct Checkpoint {
    slots: Vec<SlotImage>,
    covered: Lsn,
    floor: Floor,
}

struct Run<'a> {
    rule: Rule,
    random: StdRng,
    database: Database,
    postgres: Option<&'a TestPostgres>,
    clock: Arc<TagClock>,
    cache: Cache,
    fills: Vec<Fill>,
    /// How far the stream was read, how far commits had settled, how far subscribers were told.
    heard: Lsn,
    settled: Lsn,
    told: Lsn,
    /// Nothing is fresh before the stream has come this far again.
    catch_up: Lsn,
    attached: bool,
    checkpoint: Option<Checkpoint>,
    seen: Seen,
}

#[derive(Debug, Default)]
struct Seen {
    fresh_hits: u64,
    /// Refused when they came, or stored and never answered: a fence at work.
    refused: u64,
    crashes: u64,
    restarts: u64,
}

fn key(n: usize) -> CacheKey {
    CacheKey::new("model", &n.to_string()).unwrap()
}

fn value_of(lookup: &Lookup) -> Option<u64> {
    match lookup {
        Lookup::Hit { entry, stale: None, .. } => Some(String::from_utf8(entry.value.to_vec()).unwrap().parse().unwrap()),
        _ => None,
    }
}

impl<'a> Run<'a> {
    fn new(rule: Rule, seed: u64, postgres: Option<&'a TestPostgres>) -> Run<'a> {
        let clock = Arc::new(TagClock::new(SLOTS, Floor(1)));
        let cache = cache(&clock, postgres);
        Run {
            rule,
            random: StdRng::seed_from_u64(seed),
            database: Database::new(),
            postgres,
            clock,
            cache,
            fills: Vec::new(),
            heard: Lsn::ZERO,
            settled: Lsn::ZERO,
            told: Lsn::ZERO,
            catch_up: Lsn::ZERO,
            attached: true,
            checkpoint: None,
            seen: Seen::default(),
        }
    }

    /// What went wrong, if anything did.
    async fn go(&mut self) -> Result<(), String> {
        for step in 0..STEPS {
            self.step().await.map_err(|wrong| format!("step {step}: {wrong}"))?;
        }
        self.come_to_rest().await
    }

    async fn step(&mut self) -> Result<(), String> {
        match self.random.random_range(0..1000) {
            0..45 => self.database.begin(&mut self.random),
            45..100 => self.database.commit(&mut self.random),
            100..110 => self.database.roll_back(&mut self.random),
            110..170 => self.database.flush(&mut self.random),
            170..260 => self.database.reveal(&mut self.random),
            260..380 => self.hear(),
            380..460 => self.settle(),
            460..500 => self.told = self.told.max(self.settled),
            500..600 => self.take_ticket(),
            600..690 => self.read_for_a_fill(),
            690..780 => self.store(),
            780..940 => self.read().await?,
            940..970 => self.compute().await?,
            970..976 => self.by_hand(),
            976..982 => self.save(),
            982..985 => self.attached = false,
            985..996 => self.attach(),
            996..998 => self.restart().await,
            _ => self.crash().await,
        }
        self.mark_hearing();
        Ok(())
    }

    /// Step 5 of the pipeline, for one commit.
    fn hear(&mut self) {
        if !self.attached {
            return;
        }
        let Some(record) = self.database.streamable().iter().find(|record| record.lsn > self.heard) else { return };
        let stamp = Stamp { lsn: record.lsn, xid: record.xid };
        record.tags.iter().for_each(|tag| self.clock.raise(tag.hash(), stamp));
        self.heard = record.lsn;
        self.cache.note_invalidated(record.lsn);
    }

    fn settle(&mut self) {
        let snapshot = self.database.snapshot();
        let open = self.database.streamable().iter().filter(|record| record.lsn > self.settled && record.lsn <= self.heard);
        let visible = open.take_while(|record| snapshot.sees(record.xid)).last().map(|record| record.lsn);
        self.settled = visible.unwrap_or(self.settled);
    }

    /// Floor and W before the snapshot.
    fn fence(&self) -> Fence {
        Fence { floor: self.clock.floor(), settled: self.settled, snapshot: self.database.snapshot() }
    }

    fn take_ticket(&mut self) {
        let (key, fence) = (self.random.random_range(0..KEYS), self.fence());
        if self.fills.len() < 12 {
            self.fills.push(Fill { key, fence, read: None });
        }
    }

    fn read_for_a_fill(&mut self) {
        if let Some(n) = self.some_fill(|fill| fill.read.is_none()) {
            let value = self.database.read(self.fills[n].key);
            self.fills[n].read = Some((value, self.database.written_lsn()));
        }
    }

    fn store(&mut self) {
        let Some(n) = self.some_fill(|fill| fill.read.is_some()) else { return };
        let Fill { key: of, fence, read } = self.fills.swap_remove(n);
        let Some((value, read_at)) = read else { return };
        let floor = self.clock.floor();
        let fence = match self.rule {
            Rule::Fences | Rule::NoFloorMove => fence,
            Rule::NoFence => Fence { snapshot: Snapshot::blind(), settled: self.heard, floor },
            Rule::ByLsn => Fence { snapshot: Snapshot::blind(), settled: read_at, floor },
        };
        let value = NewValue {
            value: value.to_string().into(),
            content_type: "text/plain".into(),
            tags: vec![tag_of(of)],
            ttl: None,
            negative: false,
        };
        let stored = self.cache.put(&key(of), value, fence).unwrap();
        self.seen.refused += u64::from(matches!(stored, walcast_cache::Stored::No(_)));
    }

    async fn read(&mut self) -> Result<(), String> {
        let of = self.random.random_range(0..KEYS);
        let lookup = self.cache.get(&key(of), AtLeast::Any).await;
        let Some(value) = value_of(&lookup) else { return Ok(()) };
        self.seen.fresh_hits += 1;
        let allowed = self.database.values_from(of, self.told);
        if allowed.contains(&value) { Ok(()) } else { Err(format!("key {of} is answered {value}, not one of {allowed:?}")) }
    }

    /// The server's own computation: reads at its fence, and is shared and stored by the library's rules.
    async fn compute(&mut self) -> Result<(), String> {
        if self.rule != Rule::Fences {
            return Ok(());
        }
        let of = self.random.random_range(0..KEYS);
        let (value, fence) = (self.database.read(of), self.fence());
        let computed = Computed {
            value: value.to_string().into(),
            content_type: "text/plain".into(),
            tags: vec![tag_of(of)],
            fence,
            ttl: None,
            negative: false,
        };
        let options = ComputeOptions { timeout: Duration::from_secs(60), ..ComputeOptions::default() };
        let compute = move || {
            let computed = computed.clone();
            async move { Ok::<_, String>(computed) }
        };
        let answer = self.cache.get_or_compute(&key(of), &options, compute).await.map_err(|error| error.to_string())?;
        let told: u64 = String::from_utf8(answer.entry.value.to_vec()).unwrap().parse().unwrap();
        let allowed = self.database.values_from(of, self.told);
        let fresh = answer.stale.is_none() && self.attached;
        if !fresh || allowed.contains(&told) {
            Ok(())
        } else {
            Err(format!("key {of} is computed as {told}, not one of {allowed:?}"))
        }
    }

    fn by_hand(&mut self) {
        let of = self.random.random_range(0..KEYS);
        let tag = if self.random.random_bool(0.8) { Tag::key(&key(of)) } else { Tag::everything() };
        self.database.message(vec![tag], &mut self.random);
    }

    fn save(&mut self) {
        self.checkpoint =
            Some(Checkpoint { slots: self.clock.changed_since(Lsn::ZERO), covered: self.heard, floor: self.clock.floor() });
    }

    fn attach(&mut self) {
        if !self.attached {
            self.attached = true;
            self.catch_up = self.database.flushed_lsn();
        }
    }

    /// Walcast ends and begins anew: from its checkpoint if it has one of this floor, else with another floor.
    async fn restart(&mut self) {
        self.seen.restarts += 1;
        self.flush().await;
        self.fills.clear();
        let floor = self.clock.floor();
        self.clock = Arc::new(TagClock::new(SLOTS, floor));
        match self.checkpoint.as_ref().filter(|checkpoint| checkpoint.floor == floor) {
            Some(checkpoint) => {
                assert!(checkpoint.slots.iter().all(|slot| self.clock.load(slot)));
                // Acknowledged is only what was told and is covered; what lies between is heard again.
                self.heard = checkpoint.covered.min(self.told);
            }
            None => {
                self.clock.move_floor(Floor(floor.0 + 1));
                self.heard = self.told;
            }
        }
        self.settled = self.heard;
        self.cache = cache(&self.clock, self.postgres);
        self.cache.note_invalidated(self.heard);
        self.attached = false;
        self.attach();
    }

    /// The unlogged table is empty afterwards, sentinel and all; that is what moves the floor.
    async fn crash(&mut self) {
        self.seen.crashes += 1;
        self.flush().await;
        if let Some(postgres) = self.postgres {
            postgres.execute("truncate walcast.cache_entries").await.unwrap();
        }
        self.database.crash();
        self.checkpoint = None;
        if self.rule != Rule::NoFloorMove {
            self.clock.move_floor(Floor(self.clock.floor().0 + 1));
        }
        self.attached = false;
        self.attach();
    }

    /// Fresh only while the stream is there and has come as far as it was flushed when it came back.
    fn mark_hearing(&self) {
        let live = self.attached && self.heard >= self.catch_up;
        self.cache.set_hearing(if live { Hearing::Live } else { Hearing::Lost { since_ms: 1 } });
    }

    async fn come_to_rest(&mut self) -> Result<(), String> {
        self.database.come_to_rest(&mut self.random);
        self.attach();
        while self.heard < self.database.flushed_lsn() {
            self.hear();
        }
        self.settle();
        self.told = self.settled;
        assert_eq!(self.told, self.database.flushed_lsn(), "all has settled");
        while !self.fills.is_empty() {
            self.read_for_a_fill();
            self.store();
        }
        self.mark_hearing();
        for of in 0..KEYS {
            let lookup = self.cache.get(&key(of), AtLeast::Any).await;
            let truth = self.database.read(of);
            if let Some(value) = value_of(&lookup).filter(|value| *value != truth) {
                return Err(format!("at rest, key {of} is answered {value} and not {truth}: stale for ever"));
            }
        }
        Ok(())
    }

    async fn flush(&self) {
        if let Some(l2) = self.cache.l2() {
            l2.flush().await;
        }
    }

    fn some_fill(&mut self, which: impl Fn(&Fill) -> bool) -> Option<usize> {
        let which: Vec<usize> = (0..self.fills.len()).filter(|n| which(&self.fills[*n])).collect();
        (!which.is_empty()).then(|| which[self.random.random_range(0..which.len())])
    }
}

fn cache(clock: &Arc<TagClock>, postgres: Option<&TestPostgres>) -> Cache {
    let l2 = postgres.map(|postgres| {
        let pool = Pool::new(&ConnectConfig::parse(&postgres.url()).unwrap(), 2, Duration::from_secs(60)).unwrap();
        let patient = Duration::from_secs(60);
        L2::start(pool, L2Config { read_timeout: patient, write_timeout: patient, ..L2Config::default() })
    });
    let cache = Cache::new(CacheConfig::default(), clock.clone(), l2);
    cache.set_epoch(Epoch(7));
    cache.set_hearing(Hearing::Live);
    cache
}

async fn runs(rule: Rule, postgres: Option<&TestPostgres>, seeds: std::ops::Range<u64>) -> (Seen, Vec<String>) {
    let (mut seen, mut wrong) = (Seen::default(), Vec::new());
    for seed in seeds {
        let mut run = Run::new(rule, seed, postgres);
        if let Err(why) = run.go().await {
            wrong.push(format!("seed {seed}: {why}"));
        }
        seen.fresh_hits += run.seen.fresh_hits;
        seen.refused += run.seen.refused;
        seen.crashes += run.seen.crashes;
        seen.restarts += run.seen.restarts;
    }
    (seen, wrong)
}

#[tokio::test]
async fn p4_and_p5_no_fresh_answer_lacks_a_commit_that_anybody_was_told_of_and_none_is_stale_for_ever() {
    let (seen, wrong) = runs(Rule::Fences, None, 0..SEEDS).await;
    assert_eq!(wrong, Vec::<String>::new());
    // A cache that stores nothing would pass too.
    assert!(seen.fresh_hits > 2_000 && seen.refused > 500 && seen.crashes > 50 && seen.restarts > 50, "{seen:?}");
}

#[tokio::test]
async fn p4_and_p5_hold_with_the_table_behind_which_outlives_restarts() {
    let postgres = TestPostgres::start().await.unwrap();
    postgres.execute("create schema walcast").await.unwrap();
    // What comes after is the face for SQL, which needs the other rooms.
    for (_, sql) in walcast_cache::MIGRATIONS.iter().filter(|(name, _)| *name < "cache/0004") {
        postgres.execute(sql).await.unwrap();
    }
    for seed in 1_000..1_004 {
        postgres.execute("truncate walcast.cache_entries").await.unwrap();
        let (seen, wrong) = runs(Rule::Fences, Some(&postgres), seed..seed + 1).await;
        assert_eq!(wrong, Vec::<String>::new());
        assert!(seen.fresh_hits > 20, "{seen:?}");
    }
}

#[tokio::test]
async fn p5_control_a_cache_without_one_of_its_rules_is_caught() {
    for rule in [Rule::NoFence, Rule::ByLsn, Rule::NoFloorMove] {
        let (seen, wrong) = runs(rule, None, 0..SEEDS).await;
        assert!(!wrong.is_empty(), "{rule:?} passes for right: {seen:?}");
        println!("{rule:?}: {} of {SEEDS} runs went wrong, such as {}", wrong.len(), wrong[0]);
    }
}
