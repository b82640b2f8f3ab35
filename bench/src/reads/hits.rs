//! Hits over HTTP at 1 and at 64 connections: `GET /cache` beside Redis GET, `GET /query` of the clinic's dashboard beside the
//! same query uncached through `pgbench`, under the same role and claims, and what either costs PostgreSQL.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use tokio::process::Command;

use super::{Load, Rate, Speech};
use crate::{
    Size,
    figures::{Figures, table},
    process,
    redis::Redis,
    stage::{Server, Stage},
    wire::{Wire, http_request, redis_command},
};

const KEYS: usize = 1_000;
const VALUE_BYTES: usize = 1_024;
const CONNECTIONS: [usize; 2] = [1, 64];
const QUERY: &str = "patient_dashboard";
const QUERIES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/queries");
const CLINIC: [&str; 2] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/sql/0001_clinic.sql"),
    concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/sql/0002_people.sql"),
];

/// One row of the table: its rounds at 1 and at 64 connections.
struct Row {
    name: &'static str,
    rates: [Vec<Rate>; 2],
}

pub async fn run(size: &Size) -> anyhow::Result<()> {
    let stage = Stage::set_with(&CLINIC).await?;
    let mut server = stage.serve(&[("WALCAST_QUERIES__DIR", QUERIES), ("WALCAST_CACHE__DEFAULT_TTL", "1h")])?;
    server.ready().await?;
    let redis = Redis::start().await?;
    let client = stage.postgres.connect().await?;
    let provider: String = client.query_one("select user_id::text from providers order by id limit 1", &[]).await?.get(0);
    let seen: Vec<i64> = client
        .query(
            "select p.id from patients p join providers d on d.user_id = $1::text::uuid where p.id <= 25 order by p.id",
            &[&provider],
        )
        .await?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let (service, nurse) = (server.token("service_role", None), server.token("authenticated", Some(&provider)));
    let cached = Arc::new(filled(&server, &service).await?);
    let queried = Arc::new(dashboards(&server, &nurse, &seen).await?);
    if let Some(redis) = &redis {
        fill_redis(redis).await?;
    }
    let gets: Arc<Vec<Vec<u8>>> =
        Arc::new((0..KEYS).map(|n| redis_command(&[b"GET", format!("bench:{n}").as_bytes()])).collect());
    let script = pgbench_script(&provider, &seen).await?;

    let empty = |name| Row { name, rates: [Vec::new(), Vec::new()] };
    let mut rows = [empty("GET /cache, hit"), empty("Redis GET"), empty("GET /query, hit"), empty("the query, pgbench")];
    let lasting = Duration::from_secs(u64::from(size.seconds).min(4));
    for _ in 0..size.rounds {
        for (place, connections) in CONNECTIONS.into_iter().enumerate() {
            let http = |requests: &Arc<Vec<Vec<u8>>>| Load {
                address: server.address(),
                speech: Speech::Http,
                requests: requests.clone(),
                connections,
                lasting,
                pid: server.pid,
            };
            rows[0].rates[place].push(http(&cached).measure().await?);
            if let Some(redis) = &redis {
                let load = Load {
                    address: &redis.address,
                    speech: Speech::Redis,
                    requests: gets.clone(),
                    pid: redis.pid,
                    ..http(&cached)
                };
                rows[1].rates[place].push(load.measure().await?);
            }
            rows[2].rates[place].push(http(&queried).measure().await?);
            rows[3].rates[place].push(pgbench(&stage, script.path(), connections, lasting).await?);
        }
    }
    server.stop().await?;
    print(size, &rows);
    Ok(())
}

fn print(size: &Size, rows: &[Row; 4]) {
    let median = |rates: &[Rate], pick: fn(&Rate) -> f64| {
        let mut figures = Figures::default();
        rates.iter().for_each(|rate| figures.add(pick(rate)));
        figures.median()
    };
    let ops = |row: &Row, place: usize| median(&row.rates[place], |rate| rate.per_second);
    let ratio = |row: usize| {
        let other = &rows[if row < 2 { 1 } else { 3 }];
        [0, 1].map(|place| if std::ptr::eq(&rows[row], other) { 1.0 } else { ops(&rows[row], place) / ops(other, place) })
    };
    let lines: Vec<Vec<String>> = rows
        .iter()
        .enumerate()
        .filter(|(_, row)| !row.rates[0].is_empty())
        .map(|(n, row)| {
            let [one, many] = ratio(n);
            let cpu = |place: usize| format!("{:.1}", median(&row.rates[place], |rate| rate.cpu_s_per_million));
            let rate = |place: usize| format!("{:.1}", ops(row, place) / 1e3);
            vec![row.name.to_owned(), rate(0), format!("{one:.2}"), cpu(0), rate(1), format!("{many:.2}"), cpu(1)]
        })
        .collect();
    let title = format!(
        "hits: {KEYS} values of {VALUE_BYTES} bytes, dashboards of 25 patients; medians of {} rounds. CPU seconds per million of \
         the server that answers; ratio to Redis, and to the uncached query",
        size.rounds
    );
    table(&title, &["", "1 conn 1,000/s", "ratio", "CPU s/M", "64 conn 1,000/s", "ratio", "CPU s/M"], &lines);
}

/// Puts each key with the ticket of its miss, and answers the requests that hit them.
async fn filled(server: &Server, token: &str) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut wire = Wire::connect(server.address()).await?;
    let value = vec![b'v'; VALUE_BYTES];
    let mut requests = Vec::new();
    for n in 0..KEYS {
        let path = format!("/cache/v1/bench/key:{n}");
        let get = http_request("GET", &path, token, "", b"");
        let miss = wire.http(&get).await?;
        let ticket = miss.header("walcast-ticket").context("a miss without a ticket")?;
        let headers = format!("walcast-ticket: {ticket}\r\ncache-tag: patients:id={n}\r\ncontent-type: text/plain\r\n");
        let put = wire.http(&http_request("PUT", &path, token, &headers, &value)).await?;
        ensure!(put.status == 200, "{}", put.head);
        requests.push(get);
    }
    Ok(requests)
}

/// Asks each dashboard until it is a hit.
async fn dashboards(server: &Server, token: &str, patients: &[i64]) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut wire = Wire::connect(server.address()).await?;
    let mut requests = Vec::new();
    for patient in patients {
        let get = http_request("GET", &format!("/query/v1/{QUERY}?patient_id={patient}"), token, "", b"");
        let mut tries = 0;
        while !wire.http(&get).await?.is_fresh_hit() {
            tries += 1;
            ensure!(tries < 1_000, "the dashboard is never cached");
        }
        requests.push(get);
    }
    Ok(requests)
}

async fn fill_redis(redis: &Redis) -> anyhow::Result<()> {
    let mut wire = Wire::connect(&redis.address).await?;
    let value = vec![b'v'; VALUE_BYTES];
    for n in 0..KEYS {
        wire.redis(&redis_command(&[b"SET", format!("bench:{n}").as_bytes(), &value])).await?;
    }
    Ok(())
}

/// As a pooled web server asks it: in a transaction, as the caller's role, with the claims.
async fn pgbench_script(provider: &str, patients: &[i64]) -> anyhow::Result<tempfile::NamedTempFile> {
    let text = tokio::fs::read_to_string(Path::new(QUERIES).join(format!("{QUERY}.sql"))).await?;
    let sql: Vec<&str> = text.lines().filter(|line| !line.starts_with("--")).collect();
    let sql = sql.join("\n").replace("$1", ":patient");
    let claims = serde_json::json!({ "role": "authenticated", "sub": provider });
    let (first, last) = (patients.first().context("no patients")?, patients.last().context("no patients")?);
    let script = tempfile::NamedTempFile::new()?;
    let lines = format!(
        "\\set patient random({first}, {last})\nbegin;\nselect set_config('role', 'authenticated', true), \
         set_config('request.jwt.claims', '{claims}', true);\n{sql};\ncommit;\n"
    );
    tokio::fs::write(script.path(), lines).await?;
    Ok(script)
}

async fn pgbench(stage: &Stage, script: &Path, connections: usize, lasting: Duration) -> anyhow::Result<Rate> {
    let postmaster = stage.postmaster().await?;
    let before = process::cpu_tree_s(postmaster)?;
    let output = Command::new("pgbench")
        .args(["-n", "-M", "prepared", "-T", &lasting.as_secs().max(1).to_string(), "-c", &connections.to_string()])
        .args(["-j", &connections.min(2).to_string(), "-f"])
        .arg(script)
        .arg(stage.postgres.url())
        .output()
        .await
        .context("running pgbench; it comes with PostgreSQL's server package")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("pgbench: {}", String::from_utf8_lossy(&output.stderr));
    }
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name))?;
        line.split_ascii_whitespace().find_map(|word| word.split('/').next()?.parse::<f64>().ok())
    };
    let per_second = number("tps =").context("pgbench tells no rate")?;
    let count = number("number of transactions actually processed:").context("pgbench tells no count")?;
    let cpu_s = process::cpu_tree_s(postmaster)? - before;
    Ok(Rate { per_second, cpu_s_per_million: cpu_s / count * 1e6 })
}
