//! The index answers as a naive matcher does that tries every binding on every change; and it costs the matches only.

use std::sync::Arc;

use proptest::prelude::*;
use walcast_model::{Cell, Change, Collation, Column, Operation, ReplicaIdentity, Row, Table, TableId, TableName, ValueKind};

use super::*;

const TEXT: Family = Family::Text(Collation { by_bytes: true, folds_ascii: true });

fn table(name: &str, price_oid: u32) -> Arc<Table> {
    let column = |name: &str, type_name: &str, type_oid, kind| Column {
        name: name.into(),
        type_oid,
        type_name: type_name.into(),
        kind,
        key: name == "id",
        tagged: true,
    };
    Arc::new(Table {
        id: TableId(1),
        name: TableName::new("public", name),
        identity: ReplicaIdentity::Default,
        columns: vec![
            column("id", "int8", 20, ValueKind::Number),
            column("price", "numeric", price_oid, ValueKind::Number),
            column("note", "text", 25, ValueKind::Text),
        ],
    })
}

fn value(text: &str) -> Cell {
    Cell::Value(text.to_owned().into())
}

fn change(operation: Operation, id: &str, price: &str) -> Change {
    changed(table("orders", 1700), operation, vec![value(id), value(price), Cell::Null])
}

fn changed(table: Arc<Table>, operation: Operation, cells: Vec<Cell>) -> Change {
    let row = Some(Row(cells));
    let (new, old) = if operation == Operation::Delete { (None, row) } else { (row, None) };
    Change { table, operation, new, old }
}

/// As the check at subscribe time leaves it.
fn binding(event: &str, schema: Option<&str>, table: Option<&str>, filter: Option<&str>) -> Binding {
    let mut binding = Binding::parse(event, schema, table, filter, None).unwrap();
    if table.is_some_and(|table| table != "*") {
        for filter in &mut binding.filters {
            (filter.family, filter.type_oid) = match filter.condition.column.as_str() {
                "id" => (Family::Integer, Some(20)),
                "price" => (Family::Numeric, Some(1700)),
                _ => (TEXT, Some(25)),
            };
        }
    }
    binding
}

fn answer(binding: Binding, change: &Change) -> Option<Wants> {
    let mut index = Index::default();
    index.subscribe(SubscriptionId(1), binding);
    let mut found = Vec::new();
    index.subscriptions(change, &mut found);
    index.unsubscribe(SubscriptionId(1));
    assert!(index.is_empty() && index.places.is_empty(), "nothing is left behind");
    assert!(found.len() <= 1, "heard once");
    found.pop().map(|(_, wants)| wants)
}

#[test]
fn order_42_reaches_its_subscriber_and_not_the_one_of_order_7() {
    let insert = change(Operation::Insert, "42", "1.50");
    let yes = |event, schema, table, filter| assert_eq!(answer(binding(event, schema, table, filter), &insert), Some(Wants::Yes));
    let no = |event, schema, table, filter| assert_eq!(answer(binding(event, schema, table, filter), &insert), None);
    yes("*", None, Some("orders"), Some("id=eq.42"));
    no("*", None, Some("orders"), Some("id=eq.7"));
    yes("INSERT", Some("public"), None, None);
    no("UPDATE", Some("public"), None, None);
    yes("*", Some("*"), Some("orders"), None);
    no("*", None, Some("patients"), None);
    yes("*", None, Some("orders"), Some("id=in.(7,42,42),price=lt.2"));
    yes("*", None, Some("orders"), Some("price=eq.1.5"));
    yes("*", None, Some("orders"), Some("note=is.null,id=not.eq.7"));
    no("*", None, Some("orders"), Some("note=eq.x"));
    let delete = change(Operation::Delete, "42", "1");
    assert_eq!(answer(binding("DELETE", None, Some("orders"), Some("id=eq.42")), &delete), Some(Wants::Yes));
}

#[test]
fn a_filter_with_a_wildcard_is_left_to_postgresql() {
    let asked = answer(binding("*", Some("public"), None, Some("id=eq.42")), &change(Operation::Insert, "42", "1"));
    assert_eq!(asked, Some(Wants::Ask));
}

#[test]
fn a_column_of_another_type_than_was_checked_is_left_to_postgresql() {
    let retyped = changed(table("orders", 701), Operation::Insert, vec![value("1"), value("1.5"), Cell::Null]);
    for filter in ["price=eq.1.5", "price=in.(1,2)", "price=lt.2"] {
        assert_eq!(answer(binding("*", None, Some("orders"), Some(filter)), &retyped), Some(Wants::Ask), "{filter}");
    }
}

#[test]
fn a_large_value_that_was_not_sent_is_no_silent_miss() {
    let kept = changed(table("orders", 1700), Operation::Update, vec![value("1"), value("1"), Cell::Unchanged]);
    for filter in ["note=eq.x", "note=in.(x,y)", "note=like.x%", "id=eq.1,note=eq.x"] {
        assert_eq!(answer(binding("*", None, Some("orders"), Some(filter)), &kept), Some(Wants::Unchanged), "{filter}");
    }
    assert_eq!(answer(binding("*", None, Some("orders"), Some("id=eq.2,note=eq.x")), &kept), None);
}

#[test]
fn a_column_that_went_is_no_silent_miss() {
    let mut narrow = (*table("orders", 1700)).clone();
    narrow.columns.remove(2);
    let insert = changed(Arc::new(narrow), Operation::Insert, vec![value("1"), value("1")]);
    for filter in ["note=eq.x", "note=in.(x,y)", "note=like.x%", "note=is.null"] {
        assert_eq!(answer(binding("*", None, Some("orders"), Some(filter)), &insert), Some(Wants::Gone), "{filter}");
    }
    assert_eq!(answer(binding("*", None, Some("*"), Some("note=eq.x")), &insert), None, "a table that never had it");
}

#[test]
fn every_subscription_to_a_table_is_found_and_again_only_once() {
    let mut index = Index::default();
    for (id, filter) in [(1, None), (2, Some("id=in.(1,2)")), (3, Some("id=gt.1")), (4, Some("id=eq.1"))] {
        index.subscribe(SubscriptionId(id), binding("*", None, Some("orders"), filter));
    }
    let mut found = Vec::new();
    index.of_table(&table("orders", 1700), &mut found);
    found.sort_unstable();
    found.dedup();
    assert_eq!(found, [1, 2, 3, 4].map(SubscriptionId));
}

#[test]
fn a_hundred_thousand_come_and_go() {
    let mut index = Index::default();
    for id in 0..100_000 {
        let filter = format!("id=eq.{}", id / 2);
        index.subscribe(SubscriptionId(id), binding("*", None, Some("orders"), (id % 4 > 0).then_some(filter.as_str())));
    }
    let mut found = Vec::new();
    index.subscriptions(&change(Operation::Insert, "31", "1"), &mut found);
    assert_eq!(found.len(), 25_000 + 2, "the unfiltered, and the two of 31");
    for id in 0..100_000 {
        index.unsubscribe(SubscriptionId(id));
    }
    assert!(index.is_empty() && index.places.is_empty());
}

fn filters() -> impl Strategy<Value = String> {
    let number = || prop_oneof![Just("0"), Just("1"), Just("1.0"), Just("2.50")];
    let text = || prop_oneof![Just("a"), Just("b"), Just("A"), Just("\"a,b\"")];
    let condition = prop_oneof![
        (prop_oneof![Just("eq"), Just("neq"), Just("lt"), Just("gte"), Just("not.eq"), Just("isdistinct")], number())
            .prop_map(|(operator, value)| format!("price={operator}.{value}")),
        (number(), number()).prop_map(|(a, b)| format!("price=in.({a},{b})")),
        (prop_oneof![Just("eq"), Just("gt"), Just("like"), Just("match"), Just("not.in")], text()).prop_map(
            |(operator, value)| {
                let value = if operator == "not.in" { format!("({value})") } else { value.to_owned() };
                format!("note={operator}.{value}")
            }
        ),
        Just("note=is.null".to_owned()),
    ];
    prop::collection::vec(condition, 0..3).prop_map(|conditions| conditions.join(","))
}

proptest! {
    #[test]
    fn the_index_says_what_the_naive_matcher_says(
        wanted in prop::collection::vec((prop_oneof![Just("*"), Just("INSERT"), Just("DELETE")], any::<bool>(), filters()), 1..20),
        rows in prop::collection::vec((0..3_usize, prop_oneof![Just("0"), Just("1.00"), Just("2.5")], 0..5_usize, any::<bool>()), 1..10),
        leaving in prop::collection::vec(any::<bool>(), 20),
    ) {
        let mut index = Index::default();
        let mut naive: Vec<(SubscriptionId, Binding)> = Vec::new();
        for (at, (event, named, filter)) in wanted.into_iter().enumerate() {
            let id = SubscriptionId(at as u64);
            let binding = binding(event, Some("public"), named.then_some("orders"), Some(&filter));
            index.subscribe(id, binding.clone());
            naive.push((id, binding));
        }
        naive.retain(|(id, _)| {
            let leaves = leaving[id.0 as usize];
            if leaves { index.unsubscribe(*id) }
            !leaves
        });
        for (operation, price, note, retyped) in rows {
            let operation = [Operation::Insert, Operation::Update, Operation::Delete][operation];
            let note = [value("a"), value("b"), Cell::Null, Cell::Unchanged, Cell::Absent][note].clone();
            let change = changed(table("orders", if retyped { 701 } else { 1700 }), operation, vec![value("1"), value(price), note]);
            let mut found = Vec::new();
            index.subscriptions(&change, &mut found);
            found.sort_unstable();
            let tried: Vec<_> = naive.iter().filter_map(|(id, binding)| binding.wants(&change).map(|wants| (*id, wants))).collect();
            prop_assert_eq!(found, tried);
        }
    }
}
