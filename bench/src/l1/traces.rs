//! Public traces from the folder that `WALCAST_TRACES` names: one key a line, and the `.lis` of the ARC paper.

use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead, BufReader},
    path::Path,
};

use anyhow::Context;

use super::loads::Load;

/// Longer ones are cut, and the output says so.
const MOST_REQUESTS: usize = 4_000_000;

pub fn found() -> anyhow::Result<Vec<Load>> {
    let Some(folder) = env::var_os("WALCAST_TRACES").filter(|folder| !folder.is_empty()) else {
        return Ok(Vec::new());
    };
    let reading = || format!("reading the traces in {}", Path::new(&folder).display());
    let mut paths = Vec::new();
    for file in fs::read_dir(&folder).with_context(reading)? {
        let path = file.with_context(reading)?.path();
        if path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    paths.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> anyhow::Result<Load> {
    let reading = || format!("reading the trace {}", path.display());
    let runs = path.extension().is_some_and(|ending| ending == "lis");
    let mut trace = Trace::default();
    for line in BufReader::new(fs::File::open(path).with_context(reading)?).split(b'\n') {
        let line = line.with_context(reading)?;
        trace.line(String::from_utf8_lossy(&line).trim(), runs).with_context(reading)?;
        if trace.order.len() >= MOST_REQUESTS {
            trace.order.truncate(MOST_REQUESTS);
            break;
        }
    }
    let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    Ok(Load { name, keys: trace.numbers.len(), order: trace.order })
}

#[derive(Default)]
struct Trace {
    numbers: HashMap<String, u32>,
    order: Vec<u32>,
}

impl Trace {
    fn line(&mut self, line: &str, runs: bool) -> anyhow::Result<()> {
        // LIRS traces part their phases by a star.
        if line.is_empty() || line.starts_with('#') || line == "*" {
            return Ok(());
        }
        if !runs {
            self.ask(line);
            return Ok(());
        }
        // First block, how many, two numbers that say nothing here.
        let mut words = line.split_ascii_whitespace();
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
        let (Some(first), Some(count)) = (number(), number()) else {
            anyhow::bail!("`{line}` does not begin with a block and a count, as lines of a .lis do");
        };
        (first..first.saturating_add(count)).take(MOST_REQUESTS).for_each(|block| self.ask(&block.to_string()));
        Ok(())
    }

    fn ask(&mut self, key: &str) {
        let next = self.numbers.len() as u32;
        let number = match self.numbers.get(key) {
            Some(number) => *number,
            None => *self.numbers.entry(key.to_owned()).or_insert(next),
        };
        self.order.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str, text: &str| {
            fs::write(folder.path().join(name), text).unwrap();
            read(&folder.path().join(name))
        };
        let lirs = read("loop.trc", "17\n18\n*\n17\r\n\n").unwrap();
        assert_eq!((lirs.order, lirs.keys, lirs.name.as_str()), (vec![0, 1, 0], 2, "loop.trc"));
        let arc = read("P1.lis", "10 3 0 0\n11 1 0 1\n").unwrap();
        assert_eq!((arc.order, arc.keys), (vec![0, 1, 2, 1], 3));
        assert!(format!("{:#}", read("P2.lis", "ten 3 0 0\n").err().unwrap()).contains("ten 3 0 0"));
    }
}
