use std::sync::Arc;

use bytes::Bytes;
use walcast_model::{
    Cell, Change, Column, Commit, Item, Lsn, Operation, ReplicaIdentity, Row, Scope, Table, TableId, TableName, ValueKind,
};

use super::{AssembleError, Assembler, Step};
use crate::pgoutput::{Message, OldImage, Relation, RelationColumn};

const LIMIT: usize = 1 << 20;

fn value(text: &str) -> Cell {
    Cell::Value(Bytes::copy_from_slice(text.as_bytes()))
}

fn row<const N: usize>(cells: [Cell; N]) -> Row {
    Row(cells.into())
}

fn patient(id: &str, name: &str) -> Row {
    row([value(id), value(name), Cell::Null])
}

/// `patients(id key, name, note)`.
fn relation(id: u32, identity: ReplicaIdentity) -> Relation {
    let column = |name: &str, key| RelationColumn { name: name.into(), type_oid: 25, type_modifier: -1, key };
    let all = identity == ReplicaIdentity::Full;
    Relation {
        id,
        schema: "public".into(),
        table: format!("patients{id}").into(),
        identity,
        columns: vec![column("id", true), column("name", all), column("note", all)],
    }
}

fn table_of(relation: &Relation) -> Table {
    let column = |column: &RelationColumn| Column {
        name: column.name.clone(),
        type_oid: column.type_oid,
        type_name: "text".into(),
        kind: ValueKind::Text,
        key: column.key,
        tagged: column.key,
    };
    Table {
        id: TableId(relation.id),
        name: TableName::new(&relation.schema, &relation.table),
        identity: relation.identity,
        columns: relation.columns.iter().map(column).collect(),
    }
}

fn begin(lsn: u64) -> Message {
    Message::Begin { final_lsn: Lsn(lsn), committed_at_us: 7, xid: lsn as u32 }
}

fn end(lsn: u64) -> Message {
    Message::Commit { lsn: Lsn(lsn), end_lsn: Lsn(lsn + 48), committed_at_us: 7 }
}

fn note(transactional: bool) -> Message {
    Message::Message { transactional, lsn: Lsn(1), prefix: "walcast".into(), content: Bytes::from_static(b"hello") }
}

fn insert(relation: u32, new: Row) -> Message {
    Message::Insert { relation, new }
}

/// Feeds a whole stream, answering every `NeedsTable`.
fn run(assembler: &mut Assembler, messages: impl IntoIterator<Item = Message>) -> Result<Vec<Commit>, AssembleError> {
    let mut commits = Vec::new();
    for message in messages {
        match assembler.push(message)? {
            Step::More => {}
            Step::NeedsTable(relation) => assembler.define(table_of(&relation))?,
            Step::Commit(commit) => commits.push(commit),
        }
    }
    Ok(commits)
}

fn items(commit: &Commit) -> &[(u32, Item)] {
    match &commit.scope {
        Scope::Whole(items) => items,
        Scope::TooLarge { .. } => panic!("not whole"),
    }
}

fn fails(messages: impl IntoIterator<Item = Message>) -> AssembleError {
    run(&mut Assembler::new(LIMIT), messages).unwrap_err()
}

/// The change that one message makes on a table of this identity.
fn change(identity: ReplicaIdentity, message: Message) -> Change {
    let mut assembler = Assembler::new(LIMIT);
    let messages = [begin(10), Message::Relation(relation(1, identity)), message, end(10)];
    let commits = run(&mut assembler, messages).unwrap();
    match &items(&commits[0])[1] {
        (0, Item::Change(change)) => change.clone(),
        other => panic!("{other:?}"),
    }
}

fn update(old: Option<OldImage>, new: Row) -> Message {
    Message::Update { relation: 1, old, new }
}

#[test]
fn a_commit_has_its_place_its_xid_and_its_items_in_order() {
    let mut assembler = Assembler::new(LIMIT);
    let stream = [
        begin(10),
        Message::Relation(relation(1, ReplicaIdentity::Default)),
        insert(1, patient("1", "Ann")),
        note(true),
        Message::Relation(relation(1, ReplicaIdentity::Default)),
        insert(1, patient("2", "Bob")),
        end(10),
        begin(20),
        insert(1, patient("3", "Cyd")),
        end(20),
    ];
    let commits = run(&mut assembler, stream).unwrap();
    let first = &commits[0];
    assert_eq!((first.lsn, first.end_lsn, first.xid, first.committed_at_us), (Lsn(10), Lsn(58), 10, 7));
    let kinds: Vec<_> = items(first)
        .iter()
        .map(|(index, item)| match item {
            Item::Change(change) => (*index, change.operation.name()),
            Item::Message { .. } => (*index, "message"),
            Item::Redefined(_) => (*index, "redefined"),
        })
        .collect();
    assert_eq!(kinds, [(0, "redefined"), (0, "INSERT"), (1, "message"), (2, "redefined"), (2, "INSERT")]);
    assert_eq!(first.end_index(), 3);
    assert!(first.size_bytes > 0);
    assert_eq!(items(&commits[1]).len(), 1, "described once a connection");
}

#[test]
fn an_update_always_has_its_key() {
    let change = change(ReplicaIdentity::Default, update(None, patient("7", "Ann")));
    assert_eq!(change.old.unwrap(), row([value("7"), Cell::Absent, Cell::Absent]));
    assert_eq!(change.new.unwrap(), patient("7", "Ann"));
}

#[test]
fn a_changed_key_keeps_its_old_value_and_the_other_columns_are_absent_not_null() {
    let sent = row([value("7"), Cell::Null, Cell::Null]);
    let change = change(ReplicaIdentity::Default, update(Some(OldImage::Key(sent)), patient("8", "Ann")));
    assert_eq!(change.old.unwrap(), row([value("7"), Cell::Absent, Cell::Absent]));
}

#[test]
fn unchanged_toast_is_filled_from_a_full_old_image_and_stays_unknown_otherwise() {
    let new = || row([value("7"), Cell::Unchanged, value("n")]);
    let full = change(ReplicaIdentity::Full, update(Some(OldImage::Full(patient("7", "long"))), new()));
    assert_eq!(full.new.unwrap(), row([value("7"), value("long"), value("n")]));
    assert_eq!(full.old.unwrap(), patient("7", "long"));
    let key_only = change(ReplicaIdentity::Default, update(None, new()));
    assert_eq!(key_only.new.unwrap(), new());
}

#[test]
fn a_toasted_key_that_did_not_change_is_filled_from_the_key_that_was_sent() {
    let sent = row([value("long"), Cell::Null, Cell::Null]);
    let new = row([Cell::Unchanged, value("Ann"), Cell::Null]);
    let change = change(ReplicaIdentity::Default, update(Some(OldImage::Key(sent)), new));
    assert_eq!(change.new.unwrap(), row([value("long"), value("Ann"), Cell::Null]));
}

#[test]
fn with_full_identity_a_missing_old_row_is_unknown_not_equal_to_the_new_one() {
    let change = change(ReplicaIdentity::Full, update(None, patient("7", "Ann")));
    assert_eq!(change.old.unwrap(), row([Cell::Absent, Cell::Absent, Cell::Absent]));
}

#[test]
fn a_delete_tells_the_key_or_with_full_identity_the_row() {
    let sent = row([value("7"), Cell::Null, Cell::Null]);
    let key = change(ReplicaIdentity::Default, Message::Delete { relation: 1, old: OldImage::Key(sent) });
    assert_eq!(key.old.unwrap(), row([value("7"), Cell::Absent, Cell::Absent]));
    assert!(key.new.is_none());
    let full = change(ReplicaIdentity::Full, Message::Delete { relation: 1, old: OldImage::Full(patient("7", "Ann")) });
    assert_eq!(full.old.unwrap(), patient("7", "Ann"));
}

#[test]
fn truncate_is_a_change_of_each_table() {
    let mut assembler = Assembler::new(LIMIT);
    let both = Message::Truncate { relations: vec![1, 2], cascade: true, restart_identity: false };
    let describe = |id| Message::Relation(relation(id, ReplicaIdentity::Default));
    let commits = run(&mut assembler, [begin(10), describe(1), describe(2), both, end(10)]).unwrap();
    let truncated: Vec<_> = items(&commits[0])
        .iter()
        .filter_map(|(index, item)| match item {
            Item::Change(change) if change.operation == Operation::Truncate => Some((*index, change.table.id.0)),
            _ => None,
        })
        .collect();
    assert_eq!(truncated, [(0, 1), (1, 2)]);
}

#[test]
fn rows_after_a_schema_change_are_read_by_the_new_description() {
    let mut assembler = Assembler::new(LIMIT);
    let mut wider = relation(1, ReplicaIdentity::Default);
    wider.columns.push(RelationColumn { name: "born".into(), type_oid: 1082, type_modifier: -1, key: false });
    let stream = [
        begin(10),
        Message::Relation(relation(1, ReplicaIdentity::Default)),
        insert(1, patient("1", "Ann")),
        Message::Relation(wider),
        insert(1, row([value("2"), value("Bob"), Cell::Null, value("2001-02-03")])),
        end(10),
    ];
    let commits = run(&mut assembler, stream).unwrap();
    let widths: Vec<_> = items(&commits[0])
        .iter()
        .filter_map(|(_, item)| match item {
            Item::Change(change) => Some((change.table.columns.len(), change.new.as_ref().unwrap().0.len())),
            _ => None,
        })
        .collect();
    assert_eq!(widths, [(3, 3), (4, 4)]);
}

#[test]
fn p7_a_huge_transaction_keeps_only_its_tables_and_its_count() {
    let mut assembler = Assembler::new(4_000);
    let describe = |id| Message::Relation(relation(id, ReplicaIdentity::Default));
    let mut stream = vec![begin(10), describe(1), describe(2), insert(2, patient("1", "Ann"))];
    stream.extend((0..1_000).map(|n| insert(1, patient(&n.to_string(), "Bob"))));
    stream.extend([note(true), describe(3), describe(2), end(10), begin(20), insert(3, patient("1", "Cyd")), end(20)]);
    let commits = run(&mut assembler, stream).unwrap();
    let Scope::TooLarge { tables, items: count } = &commits[0].scope else { panic!("kept {} bytes", commits[0].size_bytes) };
    let ids: Vec<_> = tables.iter().map(|table| table.id.0).collect();
    assert_eq!((ids, *count, commits[0].end_index()), (vec![1, 2, 3], 1_002, 1_002));
    assert!(commits[0].size_bytes < 1_000);
    assert_eq!(items(&commits[1]).len(), 1, "the next one is whole again, and table 3 is known");
}

#[test]
fn p7_a_table_renamed_within_a_huge_transaction_is_there_under_both_names() {
    let mut assembler = Assembler::new(0);
    let mut renamed = relation(1, ReplicaIdentity::Default);
    renamed.table = "persons".into();
    let stream = [
        begin(10),
        Message::Relation(relation(1, ReplicaIdentity::Default)),
        insert(1, patient("1", "Ann")),
        Message::Relation(renamed),
        insert(1, patient("2", "Ann")),
        end(10),
    ];
    let commits = run(&mut assembler, stream).unwrap();
    let Scope::TooLarge { tables, items: 2 } = &commits[0].scope else { panic!("too large") };
    let names: Vec<_> = tables.iter().map(|table| table.name.table()).collect();
    assert_eq!(names, ["patients1", "persons"]);
}

#[test]
fn the_size_counts_what_is_kept() {
    let mut assembler = Assembler::new(LIMIT);
    let describe = Message::Relation(relation(1, ReplicaIdentity::Default));
    let long = "x".repeat(10_000);
    let stream = [begin(10), describe, insert(1, patient("1", "a")), end(10), begin(20), insert(1, patient("1", &long)), end(20)];
    let commits = run(&mut assembler, stream).unwrap();
    assert!(commits[1].size_bytes > 10_000, "{}", commits[1].size_bytes);
    assert!(commits[0].size_bytes < 2_000, "{}", commits[0].size_bytes);
}

#[test]
fn a_message_without_a_transaction_has_no_place_in_the_order() {
    let mut assembler = Assembler::new(LIMIT);
    let describe = Message::Relation(relation(1, ReplicaIdentity::Default));
    let origin = Message::Origin { lsn: Lsn(1), name: "elsewhere".into() };
    let data_type = Message::Type { oid: 1, schema: "public".into(), name: "mood".into() };
    let stream = [note(false), begin(10), origin, data_type, describe, note(false), insert(1, patient("1", "Ann")), end(10)];
    let commits = run(&mut assembler, stream).unwrap();
    assert_eq!(commits[0].end_index(), 1);
    assert_eq!(fails([note(true)]), AssembleError::Outside("message"));
}

#[test]
fn begin_and_commit_come_in_pairs() {
    assert_eq!(fails([end(10)]), AssembleError::Outside("commit"));
    assert_eq!(fails([begin(10), begin(20)]), AssembleError::Nested { open: 10, xid: 20 });
    assert_eq!(fails([begin(10), end(20)]), AssembleError::Mismatch { xid: 10, begun: Lsn(10), ended: Lsn(20) });
    assert_eq!(fails([begin(10), end(10), end(10)]), AssembleError::Outside("commit"));
    let describe = Message::Relation(relation(1, ReplicaIdentity::Default));
    assert_eq!(fails([describe.clone()]), AssembleError::Outside("relation"));
    assert_eq!(fails([begin(10), describe, end(10), insert(1, patient("1", "Ann"))]), AssembleError::Outside("change"));
}

#[test]
fn rows_that_do_not_fit_their_description_are_refused() {
    let describe = || Message::Relation(relation(1, ReplicaIdentity::Default));
    assert_eq!(fails([begin(10), insert(1, patient("1", "Ann"))]), AssembleError::Unknown(1));
    let short = insert(1, row([value("1")]));
    let wrong = AssembleError::Columns { table: "public.patients1".into(), expected: 3, found: 1 };
    assert_eq!(fails([begin(10), describe(), short]), wrong);
    let short = Message::Delete { relation: 1, old: OldImage::Key(row([value("1")])) };
    assert_eq!(fails([begin(10), describe(), short]), wrong);
    let truncate = Message::Truncate { relations: vec![1, 9], cascade: false, restart_identity: false };
    assert_eq!(fails([begin(10), describe(), truncate]), AssembleError::Unknown(9));
}

#[test]
fn nothing_is_read_before_the_table_is_defined() {
    let mut assembler = Assembler::new(LIMIT);
    assembler.push(begin(10)).unwrap();
    let described = relation(1, ReplicaIdentity::Default);
    assert_eq!(assembler.define(table_of(&described)).unwrap_err(), AssembleError::Unasked(1));
    assert!(matches!(assembler.push(Message::Relation(described.clone())), Ok(Step::NeedsTable(asked)) if asked == described));
    assert_eq!(assembler.push(insert(1, patient("1", "Ann"))).unwrap_err(), AssembleError::Undefined(1));
    assert_eq!(assembler.define(table_of(&relation(2, ReplicaIdentity::Default))).unwrap_err(), AssembleError::Unasked(2));
    let mut narrow = table_of(&described);
    narrow.columns.pop();
    assert!(matches!(assembler.define(narrow), Err(AssembleError::Columns { .. })));
    assembler.define(table_of(&described)).unwrap();
    assembler.push(insert(1, patient("1", "Ann"))).unwrap();
    let Step::Commit(commit) = assembler.push(end(10)).unwrap() else { panic!("a commit") };
    let (Item::Redefined(shared), Item::Change(change)) = (&items(&commit)[0].1, &items(&commit)[1].1) else {
        panic!("two items")
    };
    assert!(Arc::ptr_eq(shared, &change.table));
}
