//! Where the figures come from: without that they mean nothing.

use std::fs;

use walcast_testkit::TestPostgres;

use crate::stage;

pub async fn print(by_itself: bool) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("machine     {cores} cores, {}, load {} at start", model(), load());
    println!("bench       {}, built {}", crate_version(), if cfg!(debug_assertions) { "for debugging" } else { "for release" });
    if by_itself {
        return Ok(());
    }
    let binary = stage::binary()?;
    let postgres = TestPostgres::start().await?;
    let row = postgres.connect().await?.query_one("select current_setting('server_version')", &[]).await?;
    let version: &str = row.get(0);
    println!("PostgreSQL  {version}, on the same machine");
    println!("walcast     {} ({}, built {})", binary.display(), crate_version(), profile(&binary));
    Ok(())
}

pub fn print_repeat() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    println!("\nload {} at the end", load());
    println!(
        "Again: cargo build --release -p walcast-server -p walcast-bench && target/release/walcast-bench {}",
        args.join(" ")
    );
}

fn crate_version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Told by the folder: the program itself does not say.
fn profile(binary: &std::path::Path) -> &'static str {
    match binary.parent().and_then(|folder| folder.file_name()).and_then(|name| name.to_str()) {
        Some("release") => "for release",
        Some("debug") => "for debugging: figures say little",
        _ => "elsewhere",
    }
}

fn model() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(':')).map_or_else(|| "processor unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_ascii_whitespace().next().unwrap_or("unknown").to_owned()
}
