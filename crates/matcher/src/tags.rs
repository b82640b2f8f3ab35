//! The tags that a commit raises: each table it touched, and each row by its keys, from the new and the old image.
//!
//! Where a value is not known (no old image of a column outside the key, TOAST, TRUNCATE), every row
//! tag of that column falls by its companion `table:column=*`. Rather too much than too little.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use walcast_model::{Cell, Change, Column, Commit, Item, Operation, Scope, Table, Tag, TagHash};

/// Row tags of a table above this are replaced by the companions of its columns: one bulk update costs a few stores.
pub(crate) const ROW_TAGS: usize = 10_000;

/// Without the tags of our own messages, which the caller reads.
pub fn tags(commit: &Commit) -> HashSet<TagHash> {
    let mut found = HashSet::new();
    match &commit.scope {
        Scope::TooLarge { tables, .. } => tables.iter().for_each(|table| whole_table(table, &mut found)),
        Scope::Whole(items) => {
            // By table: a bulk update of one lets its own row tags go, and nobody else's.
            let mut tables: HashMap<*const Table, Option<HashSet<TagHash>>> = HashMap::new();
            for (_, item) in items {
                let Item::Change(change) = item else { continue };
                let rows = tables.entry(Arc::as_ptr(&change.table)).or_insert_with(|| Some(HashSet::new()));
                let Some(tags) = rows else { continue };
                of_change(change, tags);
                if tags.len() > ROW_TAGS {
                    *rows = None;
                    whole_table(&change.table, &mut found);
                }
            }
            tables.into_values().flatten().for_each(|tags| found.extend(tags));
        }
    }
    found
}

fn of_change(change: &Change, found: &mut HashSet<TagHash>) {
    if change.operation == Operation::Truncate {
        return whole_table(&change.table, found);
    }
    found.insert(Tag::table(&change.table.name).hash());
    for (index, column) in change.table.columns.iter().enumerate().filter(|(_, column)| column.tagged) {
        if let Some(new) = &change.new {
            value(&change.table, column, new.cell(index), found);
        }
        match (&change.old, change.operation) {
            (Some(old), _) => value(&change.table, column, old.cell(index), found),
            (None, Operation::Insert) => {}
            (None, _) => unknown(&change.table, column, found),
        }
    }
}

fn value(table: &Table, column: &Column, cell: &Cell, found: &mut HashSet<TagHash>) {
    match cell {
        // `column = value` never holds for null.
        Cell::Null => {}
        Cell::Unchanged | Cell::Absent => unknown(table, column, found),
        Cell::Value(_) => match cell.text().and_then(|text| Tag::row(&table.name, &column.name, text)) {
            Some(tag) => {
                found.insert(tag.hash());
            }
            // Too long to narrow by: nobody carries such a tag, but nobody should have to know that.
            None => unknown(table, column, found),
        },
    }
}

fn unknown(table: &Table, column: &Column, found: &mut HashSet<TagHash>) {
    found.insert(Tag::any_row(&table.name, &column.name).hash());
}

/// The table's tag and the companions of all its columns, tagged now or not: entries may be older than an index.
fn whole_table(table: &Table, found: &mut HashSet<TagHash>) {
    found.insert(Tag::table(&table.name).hash());
    table.columns.iter().for_each(|column| unknown(table, column, found));
}

/// What a redefined table takes with it.
pub fn of_table(table: &Table) -> HashSet<TagHash> {
    let mut found = HashSet::new();
    whole_table(table, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use walcast_model::{Lsn, ReplicaIdentity, Row, TableId, TableName, ValueKind};

    use super::*;

    fn table() -> Arc<Table> {
        let column = |name: &str, tagged| Column {
            name: name.into(),
            type_oid: 20,
            type_name: "int8".into(),
            kind: ValueKind::Number,
            key: name == "id",
            tagged,
        };
        Arc::new(Table {
            id: TableId(1),
            name: TableName::new("public", "vitals"),
            identity: ReplicaIdentity::Default,
            columns: vec![column("id", true), column("patient_id", true), column("value", false)],
        })
    }

    fn cell(text: &str) -> Cell {
        match text {
            "?" => Cell::Absent,
            "~" => Cell::Unchanged,
            text => Cell::Value(text.to_owned().into()),
        }
    }

    fn check(operation: Operation, new: Option<[&str; 3]>, old: Option<[&str; 3]>, expected: &[&str]) {
        let row = |cells: [&str; 3]| Row(cells.map(cell).into());
        let change = Change { table: table(), operation, new: new.map(row), old: old.map(row) };
        let commit = Commit {
            lsn: Lsn(1),
            end_lsn: Lsn(2),
            xid: 3,
            committed_at_us: 0,
            scope: Scope::Whole(vec![(0, Item::Change(change))]),
            size_bytes: 0,
        };
        let expected: HashSet<_> = expected.iter().map(|text| Tag::stored(text).hash()).collect();
        assert_eq!(tags(&commit), expected, "{operation:?} {new:?} {old:?}");
    }

    #[test]
    fn an_insert_raises_its_table_and_its_rows() {
        check(Operation::Insert, Some(["1", "7", "80"]), None, &["vitals", "vitals:id=1", "vitals:patient_id=7"]);
    }

    #[test]
    fn an_update_raises_where_the_row_was_and_where_it_is() {
        let both = ["vitals", "vitals:id=1", "vitals:patient_id=7", "vitals:patient_id=8"];
        check(Operation::Update, Some(["1", "8", "80"]), Some(["1", "7", "80"]), &both);
    }

    #[test]
    fn a_key_only_old_image_raises_the_companion_of_what_it_lacks() {
        let wide = ["vitals", "vitals:id=1", "vitals:patient_id=8", "vitals:patient_id=*"];
        check(Operation::Update, Some(["1", "8", "80"]), Some(["1", "?", "?"]), &wide);
        check(Operation::Delete, None, Some(["1", "?", "?"]), &["vitals", "vitals:id=1", "vitals:patient_id=*"]);
        check(
            Operation::Update,
            Some(["1", "~", "80"]),
            Some(["1", "7", "80"]),
            &["vitals", "vitals:id=1", "vitals:patient_id=7", "vitals:patient_id=*"],
        );
    }

    #[test]
    fn p7_a_bulk_update_raises_its_columns_and_leaves_other_tables_their_rows() {
        let change = |table: &Arc<Table>, n: usize| {
            let new = Row([n.to_string(), "7".into(), "80".into()].map(|text| cell(&text)).into());
            (n as u32, Item::Change(Change { table: table.clone(), operation: Operation::Insert, new: Some(new), old: None }))
        };
        let other = Arc::new(Table { name: TableName::new("public", "other"), ..(*table()).clone() });
        let bulk = table();
        let items = (0..20_000).map(|n| change(&bulk, n)).chain([change(&other, 20_000)]).collect();
        let scope = Scope::Whole(items);
        let commit = Commit { lsn: Lsn(1), end_lsn: Lsn(2), xid: 3, committed_at_us: 0, scope, size_bytes: 0 };
        let expected = ["vitals", "vitals:id=*", "vitals:patient_id=*", "vitals:value=*"];
        let expected = expected.into_iter().chain(["other", "other:id=20000", "other:patient_id=7"]);
        assert_eq!(tags(&commit), expected.map(|text| Tag::stored(text).hash()).collect());
    }

    #[test]
    fn truncate_raises_every_row() {
        check(Operation::Truncate, None, None, &["vitals", "vitals:id=*", "vitals:patient_id=*", "vitals:value=*"]);
    }
}
