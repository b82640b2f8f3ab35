//! What one client may have heard of rows 1, 2, 3, … that one writer committed one after the other: each once and in
//! order, or a `resync` where some are missing. Anything else fails.

use anyhow::{Result, bail, ensure};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    Row(i64),
    Resync,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub delivered: i64,
    /// Missing, but it was told.
    pub told: i64,
}

pub fn judge(heard: &[Heard], last: i64) -> Result<Verdict> {
    let (mut next, mut told, mut verdict) = (1, false, Verdict::default());
    for event in heard {
        match event {
            Heard::Resync => told = true,
            Heard::Row(id) if *id < next => bail!("row {id} came again, or out of order: row {next} was due"),
            Heard::Row(id) => {
                let missing = id - next;
                ensure!(missing == 0 || told, "{missing} rows were lost before row {id}, and nobody said so");
                verdict.told += missing;
                verdict.delivered += 1;
                (next, told) = (id + 1, false);
            }
        }
    }
    ensure!(next > last || told, "the end is missing: row {next} was due, {last} was the last");
    verdict.told += last + 1 - next;
    Ok(verdict)
}

#[test]
fn the_judge_accepts_what_is_whole_or_told_and_nothing_else() {
    use Heard::{Resync, Row};
    let whole: Vec<Heard> = (1..=20).map(Row).collect();
    assert_eq!(judge(&whole, 20).unwrap(), Verdict { delivered: 20, told: 0 });
    let broken = |what: &str, spoil: &dyn Fn(&mut Vec<Heard>)| {
        let mut heard = whole.clone();
        spoil(&mut heard);
        assert!(judge(&heard, 20).is_err(), "{what} went unnoticed");
        heard
    };
    let mut gap = broken("one dropped event", &|heard| heard.retain(|event| *event != Row(8)));
    broken("a lost beginning", &|heard| heard.retain(|event| *event != Row(1)));
    broken("a lost end", &|heard| heard.truncate(19));
    broken("a repeated event", &|heard| heard.insert(7, Row(7)));
    broken("a repeated stretch", &|heard| drop(heard.splice(9..9, (4..9).map(Row))));
    broken("two events in another order", &|heard| heard.swap(7, 8));
    broken("a resync somewhere else", &|heard| {
        heard.insert(3, Resync);
        heard.remove(9);
    });
    gap.insert(7, Resync);
    assert_eq!(judge(&gap, 20).unwrap(), Verdict { delivered: 19, told: 1 });
}
