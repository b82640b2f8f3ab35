//! The tags that the config's rules add to a commit's own: `student:7` for a change of an enrolment.
//!
//! Pure. What a rule asks of the database (a cascade) is handed back as keys, for whoever may ask. Where a value is not
//! known, or there are too many, the rule's coarse form `student:*` is raised instead: rather too much than too little.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use walcast_model::{Cell, Change, Commit, Item, Operation, Row, Scope, Table, TableId, TableName, TagHash};

use crate::{
    binding::EventMask,
    tags::ROW_TAGS,
    template::{Filled, Image, Reference, Template},
};

#[derive(Debug, Clone)]
pub struct TagRule {
    pub table: TableName,
    /// Followed by its id too: a renamed table is still the one that was meant.
    pub id: TableId,
    pub on: EventMask,
    /// Not empty: only updates that changed one of these.
    pub when_changed: Vec<Arc<str>>,
    pub raise: Vec<Template>,
    /// Set for a cascade: the row's columns that one lookup takes.
    pub keys: Option<Vec<Reference>>,
}

/// One lookup's values, in the order of [`TagRule::keys`]; null is none.
pub type Key = Box<[Option<Box<str>>]>;

#[derive(Debug, Default)]
pub struct Raised {
    pub tags: HashSet<TagHash>,
    /// Rules by their index, with what they look up.
    pub lookups: Vec<(usize, HashSet<Key>)>,
}

#[derive(Debug, Default)]
pub struct TagRules {
    rules: Vec<TagRule>,
    by_name: HashMap<TableName, Vec<usize>>,
    by_id: HashMap<TableId, Vec<usize>>,
    /// Tables whose every change moves what some lookup answers, with the words that fall then.
    moving: HashMap<TableName, Vec<TagHash>>,
}

/// What one rule found in one commit.
#[derive(Default)]
struct Found {
    /// Too many, or all: the coarse forms instead.
    wide: bool,
    tags: HashSet<TagHash>,
    keys: HashSet<Key>,
}

impl TagRules {
    /// `moving`: tables that lookups read, and the templates of those lookups.
    pub fn new<'a>(rules: Vec<TagRule>, moving: impl Iterator<Item = (&'a TableName, &'a Template)>) -> TagRules {
        let mut made = TagRules::default();
        for (table, template) in moving {
            made.moving.entry(table.clone()).or_default().push(template.companion());
        }
        for (index, rule) in rules.iter().enumerate() {
            made.by_name.entry(rule.table.clone()).or_default().push(index);
            made.by_id.entry(rule.id).or_default().push(index);
        }
        TagRules { rules, ..made }
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// None if no rule has its word; else whether one of them could raise it.
    pub fn could_raise(&self, tag: &walcast_model::Tag) -> Option<bool> {
        let (word, _) = tag.word_parts()?;
        let mut of_word = self.rules.iter().flat_map(|rule| &rule.raise).filter(|template| template.word() == word).peekable();
        of_word.peek()?;
        Some(of_word.any(|template| template.fits(tag)))
    }

    pub fn raised(&self, commit: &Commit) -> Raised {
        let mut raised = Raised::default();
        if self.rules.is_empty() {
            return raised;
        }
        let items = match &commit.scope {
            Scope::TooLarge { tables, .. } => {
                tables.iter().for_each(|table| raised.tags.extend(self.of_table(table)));
                return raised;
            }
            Scope::Whole(items) => items,
        };
        let mut found: HashMap<usize, Found> = HashMap::new();
        // Rows of one table come in long runs; this spares the search.
        let mut last: Option<(*const Table, Vec<usize>)> = None;
        for (_, item) in items {
            let Item::Change(change) = item else { continue };
            let table = Arc::as_ptr(&change.table);
            if last.as_ref().is_none_or(|(known, _)| *known != table) {
                raised.tags.extend(self.moving.get(&change.table.name).into_iter().flatten());
                last = Some((table, self.of(change.table.id, &change.table.name)));
            }
            for index in last.iter().flat_map(|(_, rules)| rules) {
                self.rules[*index].change(change, found.entry(*index).or_default());
            }
        }
        for (index, found) in found {
            if found.wide {
                raised.tags.extend(self.rules[index].companions());
            } else {
                raised.tags.extend(found.tags);
                raised.lookups.extend((!found.keys.is_empty()).then_some((index, found.keys)));
            }
        }
        raised
    }

    /// The coarse forms of all rules of a table, and of those that look it up: it was truncated, or redefined.
    pub fn of_table(&self, table: &Table) -> HashSet<TagHash> {
        self.of_named(table.id, &table.name)
    }

    /// The same, of a table that only the catalog speaks of.
    pub fn of_named(&self, id: TableId, name: &TableName) -> HashSet<TagHash> {
        let of_rules = self.of(id, name).into_iter().flat_map(|index| self.rules[index].companions());
        of_rules.chain(self.moving.get(name).into_iter().flatten().copied()).collect()
    }

    /// The coarse forms of one rule: its lookup cannot be answered.
    pub fn companions(&self, rule: usize) -> impl Iterator<Item = TagHash> {
        self.rules.get(rule).into_iter().flat_map(TagRule::companions)
    }

    /// The coarse forms of all of them: nobody knows what the rules mean now.
    pub fn everything(&self) -> HashSet<TagHash> {
        self.rules.iter().flat_map(TagRule::companions).collect()
    }

    fn of(&self, id: TableId, name: &TableName) -> Vec<usize> {
        let by_name = self.by_name.get(name).into_iter().flatten();
        let mut rules: Vec<usize> = by_name.chain(self.by_id.get(&id).into_iter().flatten()).copied().collect();
        rules.sort_unstable();
        rules.dedup();
        rules
    }
}

impl TagRule {
    fn companions(&self) -> impl Iterator<Item = TagHash> {
        self.raise.iter().map(Template::companion)
    }

    fn change(&self, change: &Change, found: &mut Found) {
        if change.operation == Operation::Truncate {
            found.wide = true;
        }
        if found.wide || !self.on.has(change.operation) || !self.concerns(change) {
            return;
        }
        let images: &[Image] = match change.operation {
            Operation::Insert => &[Image::New],
            Operation::Delete => &[Image::Old],
            Operation::Update | Operation::Truncate => &[Image::New, Image::Old],
        };
        for image in images {
            match &self.keys {
                None => found.tags.extend(self.raise.iter().filter_map(|template| template.fill(|r| cell(change, r, *image)))),
                Some(columns) => match key(change, columns, *image) {
                    Some(Some(key)) => drop(found.keys.insert(key)),
                    Some(None) => {}
                    None => found.tags.extend(self.companions()),
                },
            }
        }
        if found.tags.len() > ROW_TAGS || found.keys.len() > ROW_TAGS {
            *found = Found { wide: true, ..Found::default() };
        }
    }

    /// An old value that is not known counts as changed.
    fn concerns(&self, change: &Change) -> bool {
        if change.operation != Operation::Update || self.when_changed.is_empty() {
            return true;
        }
        self.when_changed.iter().any(|name| {
            let Some((index, _)) = change.table.column(name) else { return true };
            match (&change.new, &change.old) {
                // Not sent because it is what it was.
                (Some(new), _) if *new.cell(index) == Cell::Unchanged => false,
                (Some(new), Some(old)) => !old.cell(index).is_known() || old.cell(index) != new.cell(index),
                _ => true,
            }
        })
    }
}

/// None: a value is not known. Some(None): there is no such image.
fn key(change: &Change, columns: &[Reference], image: Image) -> Option<Option<Key>> {
    let mut values = Vec::with_capacity(columns.len());
    let mut unknown = false;
    for column in columns {
        match (cell(change, column, image), is_null(change, column, image)) {
            (Filled::Value(text), _) => values.push(Some(text.into())),
            (Filled::Unknown, _) => unknown = true,
            (Filled::Nothing, true) => values.push(None),
            (Filled::Nothing, false) => return Some(None),
        }
    }
    (!unknown).then(|| Some(values.into()))
}

/// Whether there is such an image at all, and if its old row came along.
fn row<'c>(change: &'c Change, column: &Reference, image: Image) -> (bool, Option<&'c Row>) {
    let image = if column.image == Image::Either { image } else { column.image };
    match image {
        Image::Old => (change.operation != Operation::Insert, change.old.as_ref()),
        Image::New | Image::Either => (change.operation != Operation::Delete, change.new.as_ref()),
    }
}

fn cell<'c>(change: &'c Change, column: &Reference, image: Image) -> Filled<'c> {
    let (exists, row) = row(change, column, image);
    if !exists {
        return Filled::Nothing;
    }
    let (Some(row), Some((index, _))) = (row, change.table.column(&column.column)) else { return Filled::Unknown };
    match row.cell(index) {
        Cell::Null => Filled::Nothing,
        value => value.text().map_or(Filled::Unknown, Filled::Value),
    }
}

fn is_null(change: &Change, column: &Reference, image: Image) -> bool {
    let (_, row) = row(change, column, image);
    let index = change.table.column(&column.column).map(|(index, _)| index);
    row.zip(index).is_some_and(|(row, index)| *row.cell(index) == Cell::Null)
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
