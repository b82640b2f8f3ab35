use walcast_model::{Column, Lsn, ReplicaIdentity, Tag, ValueKind};

use super::*;

const COLUMNS: [&str; 4] = ["id", "student_id", "status", "note"];

fn table() -> Arc<Table> {
    let column = |name: &&str| Column {
        name: (*name).into(),
        type_oid: 20,
        type_name: "int8".into(),
        kind: ValueKind::Number,
        key: *name == "id",
        tagged: false,
    };
    Arc::new(Table {
        id: TableId(1),
        name: TableName::new("public", "enrolments"),
        identity: ReplicaIdentity::Default,
        columns: COLUMNS.iter().map(column).collect(),
    })
}

fn row(cells: &str) -> Row {
    let cell = |text: &str| match text {
        "?" => Cell::Absent,
        "~" => Cell::Unchanged,
        "-" => Cell::Null,
        text => Cell::Value(text.to_owned().into()),
    };
    Row(cells.split(' ').map(cell).collect())
}

fn change(operation: Operation, new: Option<&str>, old: Option<&str>) -> Change {
    Change { table: table(), operation, new: new.map(row), old: old.map(row) }
}

fn commit(changes: Vec<Change>) -> Commit {
    let items = changes.into_iter().enumerate().map(|(index, change)| (index as u32, Item::Change(change))).collect();
    Commit { lsn: Lsn(1), end_lsn: Lsn(2), xid: 3, committed_at_us: 0, scope: Scope::Whole(items), size_bytes: 0 }
}

fn rule(templates: &[&str]) -> TagRule {
    TagRule {
        table: TableName::new("public", "enrolments"),
        id: TableId(1),
        on: EventMask::ALL,
        when_changed: Vec::new(),
        raise: templates.iter().map(|text| Template::parse(text).unwrap()).collect(),
        keys: None,
    }
}

fn rules(rule: TagRule) -> TagRules {
    TagRules::new(vec![rule], std::iter::empty())
}

fn hashes(tags: &[&str]) -> HashSet<TagHash> {
    tags.iter().map(|text| Tag::stored(text).hash()).collect()
}

fn check(rule: TagRule, change: Change, expected: &[&str]) {
    let shown = format!("{rule:?} {change:?}");
    assert_eq!(rules(rule).raised(&commit(vec![change])).tags, hashes(expected), "{shown}");
}

use Operation::{Delete, Insert, Truncate, Update};

#[test]
fn a_rule_raises_from_where_the_row_was_and_where_it_is() {
    let student = || rule(&["student:{student_id}"]);
    check(student(), change(Insert, Some("1 7 a x"), None), &["student:7"]);
    check(student(), change(Update, Some("1 8 a x"), Some("1 7 a x")), &["student:7", "student:8"]);
    check(student(), change(Update, Some("1 8 a x"), Some("1 ? ? ?")), &["student:8", "student:*"]);
    check(student(), change(Delete, None, Some("1 7 a x")), &["student:7"]);
    check(student(), change(Delete, None, Some("1 ? ? ?")), &["student:*"]);
    check(student(), change(Delete, None, Some("1 - a x")), &[]);
    check(student(), change(Truncate, None, None), &["student:*"]);
    check(student(), change(Update, Some("1 ~ a x"), None), &["student:*"]);
}

#[test]
fn a_template_may_pick_an_image() {
    let new = || rule(&["s:{new.student_id}"]);
    check(new(), change(Update, Some("1 8 a x"), Some("1 ? ? ?")), &["s:8"]);
    check(new(), change(Delete, None, Some("1 7 a x")), &[]);
    let old = || rule(&["s:{old.student_id}"]);
    check(old(), change(Insert, Some("1 8 a x"), None), &[]);
    check(old(), change(Update, Some("1 8 a x"), Some("1 7 a x")), &["s:7"]);
    let both = rule(&["s:{old.student_id}:{new.student_id}"]);
    check(both, change(Update, Some("1 8 a x"), Some("1 7 a x")), &["s:7:8"]);
}

#[test]
fn a_conditional_rule_fires_for_its_operations_and_for_the_columns_that_changed() {
    let status = || TagRule { when_changed: vec!["status".into()], ..rule(&["s:{student_id}"]) };
    check(status(), change(Update, Some("1 7 a y"), Some("1 7 a x")), &[]);
    check(status(), change(Update, Some("1 7 b x"), Some("1 7 a x")), &["s:7"]);
    check(status(), change(Update, Some("1 7 - x"), Some("1 7 a x")), &["s:7"]);
    check(status(), change(Update, Some("1 7 ~ x"), Some("1 7 ? x")), &[]);
    check(status(), change(Update, Some("1 7 a x"), Some("1 7 ? x")), &["s:7"]);
    check(status(), change(Insert, Some("1 7 a x"), None), &["s:7"]);
    let gone = TagRule { when_changed: vec!["renamed".into()], ..rule(&["s:{student_id}"]) };
    check(gone, change(Update, Some("1 7 a x"), Some("1 7 a x")), &["s:7"]);
    let inserts = || TagRule { on: EventMask::parse("insert"), ..rule(&["s:{student_id}"]) };
    check(inserts(), change(Update, Some("1 8 b x"), Some("1 7 a x")), &[]);
    check(inserts(), change(Truncate, None, None), &["s:*"]);
}

#[test]
fn a_cascade_hands_back_what_to_look_up_and_widens_where_it_cannot_know() {
    let cascade = || {
        let keys = ["student_id", "note"].map(Reference::parse).to_vec();
        rules(TagRule { keys: Some(keys), ..rule(&["product:{product_id}"]) })
    };
    let key = |parts: [Option<&str>; 2]| Key::from(parts.map(|part| part.map(Box::from)));
    let raised = cascade().raised(&commit(vec![change(Update, Some("1 8 a -"), Some("1 7 a x"))]));
    assert!(raised.tags.is_empty());
    assert_eq!(raised.lookups, [(0, HashSet::from([key([Some("8"), None]), key([Some("7"), Some("x")])]))]);
    let raised = cascade().raised(&commit(vec![change(Update, Some("1 8 a x"), Some("1 ? ? ?"))]));
    assert_eq!((raised.tags, raised.lookups.len()), (hashes(&["product:*"]), 1));
}

#[test]
fn p7_a_bulk_commit_raises_coarse_tags_and_no_lookups() {
    let many = |rule| {
        let change = |n: u64| change(Insert, Some(&format!("{n} {n} a x")), None);
        rules(rule).raised(&commit((0..20_000).map(change).collect()))
    };
    let raised = many(rule(&["s:{student_id}", "e:{id}"]));
    assert_eq!(raised.tags, hashes(&["s:*", "e:*"]));
    let raised = many(TagRule { keys: Some(vec![Reference::parse("student_id")]), ..rule(&["product:{product_id}"]) });
    assert_eq!((raised.tags, raised.lookups.len()), (hashes(&["product:*"]), 0));
}

#[test]
fn a_table_that_is_looked_up_moves_the_words_of_the_lookup() {
    let template = Template::parse("product:{product_id}").unwrap();
    let table = TableName::new("public", "enrolments");
    let other = TagRule { table: TableName::new("public", "lessons"), id: TableId(2), ..rule(&["product:{product_id}"]) };
    let rules = TagRules::new(vec![other], [(&table, &template)].into_iter());
    let raised = rules.raised(&commit(vec![change(Insert, Some("1 7 a x"), None)]));
    assert_eq!(raised.tags, hashes(&["product:*"]));
}

#[test]
fn a_renamed_table_is_still_the_one_that_was_meant() {
    let rules = rules(TagRule { table: TableName::new("public", "before"), ..rule(&["s:{student_id}"]) });
    assert_eq!(rules.raised(&commit(vec![change(Insert, Some("1 7 a x"), None)])).tags, hashes(&["s:7"]));
}

#[test]
fn only_what_some_rule_spells_could_be_raised() {
    let rules = rules(rule(&["s:{student_id}"]));
    let could = |text: &str| rules.could_raise(&Tag::parse(text).unwrap());
    assert_eq!(could("s:7"), Some(true));
    assert_eq!(could("s:7:x"), Some(false));
    assert_eq!(could("s:*"), Some(false));
    assert_eq!((could("t:7"), could("s"), could("s:a=7")), (None, None, None));
}
