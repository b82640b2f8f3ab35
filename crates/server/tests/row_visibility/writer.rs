//! Writes rows at random: one statement at a time, and what it touches. The same seed writes the same.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use crate::judge::{Kind, Touch};

/// A table that is written at random: each column takes one of these SQL values.
pub struct Subject {
    pub table: &'static str,
    pub key: &'static str,
    pub columns: &'static [(&'static str, &'static [&'static str])],
    pub full: bool,
    /// Whoever may see must hear.
    pub ordinary: bool,
}

pub const fn subject(table: &'static str, columns: &'static [(&'static str, &'static [&'static str])]) -> Subject {
    Subject { table, key: "id", columns, full: true, ordinary: true }
}

/// What is known of the rows that were written, and what to write next.
pub struct Writer {
    pub random: StdRng,
    pub next_id: i64,
    live: Vec<(usize, i64)>,
}

impl Writer {
    pub fn new(seed: u64) -> Writer {
        Writer { random: StdRng::seed_from_u64(seed), next_id: 1_000_000, live: Vec::new() }
    }

    pub fn chance(&mut self, percent: u32) -> bool {
        self.random.random_ratio(percent, 100)
    }

    /// One statement on one row of `subjects[which]`.
    pub fn write(&mut self, subjects: &[Subject], which: usize, overriding: bool) -> (String, Touch) {
        let subject = &subjects[which];
        let (table, key) = (format!("public.\"{}\"", subject.table), format!("\"{}\"", subject.key));
        let mine: Vec<i64> = self.live.iter().filter(|(at, _)| *at == which).map(|(_, id)| *id).collect();
        let touch = |kind, before, after| Touch {
            table: subject.table.into(),
            key: subject.key,
            kind,
            before,
            after,
            full: subject.full,
            complete: subject.ordinary,
        };
        let value = |random: &mut StdRng, values: &[&'static str]| *values.choose(random).expect("values are given");
        if mine.is_empty() || (mine.len() < 6 && self.chance(35)) {
            self.next_id += 1;
            let names: Vec<&str> = subject.columns.iter().map(|(name, _)| *name).collect();
            let values: Vec<&str> = subject.columns.iter().map(|(_, values)| value(&mut self.random, values)).collect();
            self.live.push((which, self.next_id));
            let how = if overriding { "overriding system value" } else { "" };
            let sql = format!(
                "insert into {table} ({key}, {}) {how} values ({}, {})",
                names.join(", "),
                self.next_id,
                values.join(", ")
            );
            return (sql, touch(Kind::Insert, self.next_id, self.next_id));
        }
        let id = *mine.choose(&mut self.random).expect("there are some");
        if self.chance(25) {
            self.live.retain(|row| *row != (which, id));
            return (format!("delete from {table} where {key} = {id}"), touch(Kind::Delete, id, id));
        }
        let mut sets = Vec::new();
        // A row that moves between partitions is a DELETE and an INSERT: judged apart.
        for (name, values) in subject.columns.iter().filter(|(name, _)| *name != "region") {
            if sets.is_empty() || self.chance(40) {
                sets.push(format!("{name} = {}", value(&mut self.random, values)));
            }
        }
        let mut after = id;
        if !overriding && self.chance(12) {
            self.next_id += 1;
            after = self.next_id;
            sets.push(format!("{key} = {after}"));
            self.live.retain(|row| *row != (which, id));
            self.live.push((which, after));
        }
        (format!("update {table} set {} where {key} = {id}", sets.join(", ")), touch(Kind::Update, id, after))
    }
}
