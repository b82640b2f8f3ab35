//! What a process has cost so far, as Linux tells it under `/proc`.

use std::fs;

use anyhow::Context;

/// The unit of `/proc/PID/stat`: 100 on every Linux that programs get to see.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds of all its threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cpu {
    pub user_s: f64,
    pub system_s: f64,
}

impl std::ops::Sub for Cpu {
    type Output = Cpu;

    fn sub(self, before: Cpu) -> Cpu {
        Cpu { user_s: self.user_s - before.user_s, system_s: self.system_s - before.system_s }
    }
}

/// User and system together.
pub fn cpu_s(pid: u32) -> anyhow::Result<f64> {
    cpu(pid).map(|cpu| cpu.user_s + cpu.system_s)
}

pub fn cpu(pid: u32) -> anyhow::Result<Cpu> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    cpu_of(&stat).with_context(|| format!("{path} has another form: {stat}"))
}

/// The same of a process and its children, those that have ended included.
pub fn cpu_tree_s(pid: u32) -> anyhow::Result<f64> {
    let mut total = 0.0;
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let name = entry?.file_name();
        let Some(stat) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else { continue };
        // A process may end between the two looks.
        let Ok(stat) = fs::read_to_string(format!("/proc/{stat}/stat")) else { continue };
        if let Some((parent, cpu_s, ended_s)) = kin_of(&stat) {
            if name.to_str() == Some(&pid.to_string()) {
                total += cpu_s + ended_s;
            } else if parent == pid {
                total += cpu_s;
            }
        }
    }
    Ok(total)
}

/// Parent, own CPU seconds, and those of children that have ended and were waited for: fields 4, 14 to 17.
fn kin_of(stat: &str) -> Option<(u32, f64, f64)> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    let (own, ended) = (ticks(11)? + ticks(12)?, ticks(13)? + ticks(14)?);
    Some((fields.get(1)?.parse().ok()?, own / TICKS_PER_SECOND, ended / TICKS_PER_SECOND))
}

/// Fields 14 and 15; the program's name, field 2, may hold blanks and brackets.
fn cpu_of(stat: &str) -> Option<Cpu> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some(Cpu { user_s: user / TICKS_PER_SECOND, system_s: system / TICKS_PER_SECOND })
}

/// Resident now and at most so far.
#[derive(Debug, Clone, Copy)]
pub struct Resident {
    pub now_kib: u64,
    pub most_kib: u64,
}

pub fn resident(pid: u32) -> anyhow::Result<Resident> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("{path} has no {name}"))?;
        let number = line.trim_end_matches("kB").trim();
        number.parse().with_context(|| format!("{name} in {path} is no number: {number}"))
    };
    Ok(Resident { now_kib: field("VmRSS:")?, most_kib: field("VmHWM:")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_seconds_are_read_past_a_name_with_blanks() {
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194304 100 0 0 0 250 50 0 0 20 0 4 0 12345";
        assert_eq!(cpu_of(stat), Some(Cpu { user_s: 2.5, system_s: 0.5 }));
        assert_eq!(cpu_of("7 (short) S"), None);
    }

    #[test]
    fn this_very_process_can_be_measured() {
        let resident = resident(std::process::id()).unwrap();
        assert!(resident.now_kib > 0 && resident.most_kib >= resident.now_kib);
        assert!(cpu_s(std::process::id()).unwrap() >= 0.0);
    }
}
