//! How often each cache hits, of what a cache that knows the future would.

use std::collections::BTreeMap;

use super::{
    Key,
    contender::{OTHERS, WALCAST},
    loads::{self, Load},
    optimum, traces,
};
use crate::figures;

const KEYS: usize = 50_000;
const REQUESTS: usize = 500_000;
/// Room for this share of a load's keys.
const ROOMS: [f64; 3] = [0.01, 0.05, 0.2];

pub fn run() -> anyhow::Result<()> {
    let generated = loads::generated(KEYS, REQUESTS);
    report("hit ratio in per cent, generated loads", &generated)?;
    let traces = traces::found()?;
    if traces.is_empty() {
        println!("\nNo traces: WALCAST_TRACES names no folder with any (bench/README.md says how to get some).");
        return Ok(());
    }
    report("hit ratio in per cent, traces", &traces)
}

fn report(title: &str, loads: &[Load]) -> anyhow::Result<()> {
    let keys = Key::many(loads.iter().map(|load| load.keys).max().unwrap_or(0))?;
    let mut means: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut rows = Vec::new();
    let mut head = vec!["load", "room", "optimum"];
    head.extend(WALCAST.iter().chain(&OTHERS).map(|named| named.name));
    for load in loads {
        for share in ROOMS {
            let entries = ((load.keys as f64 * share) as usize).max(1);
            let percent = |hits: usize| hits as f64 * 100.0 / load.order.len().max(1) as f64;
            let mut row = vec![format!("{} ({} of {})", load.name, load.order.len(), load.keys), entries.to_string()];
            let mut add = |name, ratio: f64| {
                row.push(format!("{ratio:.2}"));
                means.entry(name).or_default().push(ratio);
            };
            add("optimum", percent(optimum::hits(&load.order, load.keys, entries)));
            for named in WALCAST.iter().chain(&OTHERS) {
                add(named.name, percent((named.make)(entries).read(&keys, &load.order)));
            }
            rows.push(row);
        }
    }
    let mean = |name: &&str| means.get(*name).map_or(f64::NAN, |all| all.iter().sum::<f64>() / all.len() as f64);
    let mut last = vec!["mean".to_owned(), String::new()];
    last.extend(head[2..].iter().map(|name| format!("{:.2}", mean(name))));
    rows.push(last);
    figures::table(title, &head, &rows);
    Ok(())
}
