//! What a read of L1 costs, on one thread and on two, beside other crates; all take turns, round by round.

use std::{
    fs,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use walcast_cache::Policy;
use walcast_model::{Lsn, Stamp, TableName, Tag, Xid};

use super::{
    Key,
    contender::{Contender, FromText, OTHERS, WALCAST, Walcast},
    loads,
};
use crate::figures::{self, Figures};

const RESIDENT: usize = 100_000;
const KEYS: usize = 1_000_000;
const REQUESTS: usize = 500_000;
const COMMITS_PER_S: u64 = 1_000;

/// Every key is there, or a tenth of them and what is missing is put.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mix {
    Hits,
    ReadsAndWrites,
}

struct Stand {
    name: &'static str,
    cache: Box<dyn Contender>,
    /// For 1 thread and for 2: CPU nanoseconds an operation, million operations a second.
    figures: [(Figures, Figures); 2],
    hits: f64,
}

pub fn run(rounds: u32) -> anyhow::Result<()> {
    let keys = Key::many(KEYS)?;
    for mix in [Mix::Hits, Mix::ReadsAndWrites] {
        let among = if mix == Mix::Hits { RESIDENT } else { KEYS };
        let orders = [11, 12].map(|seed| loads::zipf(among, REQUESTS, seed));
        let mut stands = stands(mix);
        // The first round fills and warms up.
        for round in 0..=rounds {
            for stand in &mut stands {
                for (index, threads) in [(0, 1), (1, 2)] {
                    let measured = measure(stand.cache.as_ref(), mix, &keys, &orders[..threads])?;
                    if round > 0 {
                        stand.figures[index].0.add(measured.cpu_ns);
                        stand.figures[index].1.add(measured.million_per_s);
                        stand.hits = measured.hits;
                    }
                }
            }
        }
        report(mix, &stands);
    }
    beside_commits(&keys, rounds)
}

fn stands(mix: Mix) -> Vec<Stand> {
    // With room for all, and some more: shards are never filled alike.
    let room = if mix == Mix::Hits { RESIDENT * 2 } else { RESIDENT };
    let stand = |name, cache| Stand { name, cache, figures: Default::default(), hits: 0.0 };
    let mut stands: Vec<_> = WALCAST.iter().chain(&OTHERS).map(|named| stand(named.name, (named.make)(room))).collect();
    if mix == Mix::Hits {
        let from_text = FromText(Walcast::new(Policy::Adaptive, room));
        stands.insert(1, stand("walcast adaptive, key from text", Box::new(from_text)));
    }
    stands
}

struct Measured {
    cpu_ns: f64,
    million_per_s: f64,
    hits: f64,
}

/// Each thread in an order of its own.
fn measure(cache: &dyn Contender, mix: Mix, keys: &[Key], orders: &[Vec<u32>]) -> anyhow::Result<Measured> {
    let start = Barrier::new(orders.len());
    let one = |order: &[u32]| -> anyhow::Result<(u64, Duration, usize)> {
        start.wait();
        let (cpu, began) = (thread_cpu_ns()?, Instant::now());
        let hits = match mix {
            Mix::Hits => cache.read(keys, order),
            Mix::ReadsAndWrites => cache.read_and_write(keys, order),
        };
        Ok((thread_cpu_ns()? - cpu, began.elapsed(), hits))
    };
    let told: anyhow::Result<Vec<_>> = thread::scope(|scope| {
        let threads: Vec<_> = orders.iter().map(|order| scope.spawn(|| one(order))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?).collect()
    });
    let told = told?;
    let requests = orders.iter().map(Vec::len).sum::<usize>() as f64;
    let longest = told.iter().map(|(_, took, _)| took.as_secs_f64()).fold(0.0, f64::max);
    Ok(Measured {
        cpu_ns: told.iter().map(|(cpu, ..)| *cpu as f64).sum::<f64>() / requests,
        million_per_s: requests / longest / 1e6,
        hits: told.iter().map(|(_, _, hits)| *hits as f64).sum::<f64>() / requests,
    })
}

/// Of the calling thread, by the scheduler's own account.
fn thread_cpu_ns() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").context("reading /proc/thread-self/schedstat")?;
    let first = text.split_ascii_whitespace().next().unwrap_or_default();
    first.parse().context("the first number of /proc/thread-self/schedstat")
}

fn report(mix: Mix, stands: &[Stand]) {
    let title = match mix {
        Mix::Hits => format!("L1, hits only: {RESIDENT} string keys, all there, Zipf 1.0, 128 bytes"),
        Mix::ReadsAndWrites => {
            format!("L1, 95 % reads, 5 % writes, a miss is filled: room for {RESIDENT} of {KEYS} string keys, Zipf 1.0")
        }
    };
    let head = ["cache", "1 thread, CPU ns/op", "Mop/s", "2 threads, CPU ns/op", "Mop/s", "hit %", "CPU ÷ walcast"];
    let own = stands[0].figures[0].0.median();
    let row = |stand: &Stand| {
        let [(cpu_1, rate_1), (cpu_2, rate_2)] = &stand.figures;
        let ratio = format!("{:.2}", cpu_1.median() / own);
        let hits = format!("{:.1}", stand.hits * 100.0);
        vec![stand.name.to_owned(), cpu_1.show(0), rate_1.show(2), cpu_2.show(0), rate_2.show(2), hits, ratio]
    };
    figures::table(&title, &head, &stands.iter().map(row).collect::<Vec<_>>());
}

/// Each raise makes the next read of every entry look at its tags again.
fn beside_commits(keys: &[Key], rounds: u32) -> anyhow::Result<()> {
    let order = [loads::zipf(RESIDENT, REQUESTS, 11)];
    let walcast = Walcast::new(Policy::Adaptive, RESIDENT * 2);
    measure(&walcast, Mix::Hits, keys, &order)?;
    let mut rows = Vec::new();
    for every in [None, Some(Duration::from_secs(1) / COMMITS_PER_S as u32)] {
        let mut cpu = Figures::default();
        for _ in 0..rounds {
            let over = AtomicBool::new(false);
            let (over, walcast) = (&over, &walcast);
            let measured = thread::scope(|scope| {
                if let Some(every) = every {
                    scope.spawn(move || commit(walcast, every, over));
                }
                let measured = measure(walcast, Mix::Hits, keys, &order);
                over.store(true, Ordering::Relaxed);
                measured
            })?;
            cpu.add(measured.cpu_ns);
        }
        let rate = every.map_or(0, |_| COMMITS_PER_S);
        rows.push(vec![format!("{rate} commits/s"), cpu.show(0)]);
    }
    figures::table("L1, adaptive, hits only, beside commits of two tags each", &["", "1 thread, CPU ns/op"], &rows);
    Ok(())
}

fn commit(walcast: &Walcast, every: Duration, over: &AtomicBool) {
    let table = Tag::table(&TableName::new("public", "elsewhere"));
    let mut lsn = 1_000_000;
    while !over.load(Ordering::Relaxed) {
        lsn += 100;
        let stamp = Stamp { lsn: Lsn(lsn), xid: Xid(lsn) };
        walcast.raise(&table, stamp);
        if let Some(row) = Tag::row(&TableName::new("public", "elsewhere"), "id", &lsn.to_string()) {
            walcast.raise(&row, stamp);
        }
        thread::sleep(every);
    }
}
