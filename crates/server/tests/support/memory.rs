//! What a process occupies, as Linux counts it.

use anyhow::{Context, Result};

pub fn resident_bytes(pid: u32) -> Result<u64> {
    status(pid, "VmRSS:")
}

/// The most it ever was.
pub fn peak_bytes(pid: u32) -> Result<u64> {
    status(pid, "VmHWM:")
}

fn status(pid: u32, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line in /proc/…/status")?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes << 10)
}

/// From now on [`peak_bytes`] tells of what comes.
pub fn forget_peak(pid: u32) -> Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").context("resetting the peak in /proc/…/clear_refs")
}
