//! Whatever a client writes as a filter: read, or refused with the reason. Never a panic, never more memory than a multiple
//! of what came; what was read means the same when it is written down and read again; and no row makes the index panic.

use std::{alloc::System, sync::Arc};

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use walcast_matcher::{Binding, Condition, Index, SubscriptionId};
use walcast_model::{
    Cell, Change, Collation, Column, Family, Operation, ReplicaIdentity, Row, Table, TableId, TableName, ValueKind,
};
use walcast_testkit::mutate::{Mutator, cases};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CORPUS: [&[u8]; 16] = [
    b"id=eq.7",
    b"id=neq.7,title=lt.abc",
    b"id=gte.-5,id=lte.99999999999999999999",
    b"price=gt.1.50,price=isdistinct.NaN",
    b"id=in.(1,2,3)",
    b"title=in.(\"a,b\",\"c\\\"d\",e)",
    b"title=not.in.(a)",
    b"title=like.%a\\%b_c%",
    b"title=ilike.A%b%c%d%",
    b"title=not.match.^a.*b$",
    b"title=imatch.(a|b)+c?",
    b"done=is.true",
    b"title=not.is.null",
    b"title=eq.\"quoted, with comma\"",
    b"title=eq.\xc3\xa4\xe2\x82\xac",
    b"uid=eq.00000000-0000-4000-8000-00000000000a",
];
const WORDS: [&[u8]; 20] = [
    b",",
    b"=",
    b".",
    b"\"",
    b"\\",
    b"(",
    b")",
    b"not.",
    b"in.(",
    b"is.",
    b"eq.",
    b"like.",
    b"%a%a%a%a%a%a%a%b",
    b"%%%%%%%%",
    b"_",
    b"\xff",
    b"\0",
    b"isdistinct.",
    b"-0",
    b"1e400",
];
const CELLS: [&str; 10] =
    ["7", "-5", "99999999999999999999", "1.50", "NaN", "t", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ä€", "", "a%b,c"];

fn table() -> Arc<Table> {
    let column = |name: &str, type_oid, kind| Column {
        name: name.into(),
        type_oid,
        type_name: "t".into(),
        kind,
        key: name == "id",
        tagged: true,
    };
    let columns = vec![
        column("id", 20, ValueKind::Number),
        column("title", 25, ValueKind::Text),
        column("price", 1700, ValueKind::Number),
        column("done", 16, ValueKind::Bool),
        column("uid", 2950, ValueKind::Text),
    ];
    Arc::new(Table { id: TableId(1), name: TableName::new("public", "todos"), identity: ReplicaIdentity::Full, columns })
}

/// As the check at subscribe time would leave it.
fn checked(mut binding: Binding) -> Binding {
    for filter in &mut binding.filters {
        (filter.family, filter.type_oid) = match filter.condition.column.as_str() {
            "id" => (Family::Integer, Some(20)),
            "price" => (Family::Numeric, Some(1700)),
            "done" => (Family::Bool, Some(16)),
            "uid" => (Family::Uuid, Some(2950)),
            _ => (Family::Text(Collation { by_bytes: true, folds_ascii: true }), Some(25)),
        };
    }
    binding
}

fn changes(table: &Arc<Table>) -> Vec<Change> {
    let cells = |n: usize| {
        let cell = |at: usize| match (n + at) % 13 {
            10 => Cell::Null,
            11 => Cell::Unchanged,
            12 => Cell::Absent,
            which => Cell::Value(CELLS[which % CELLS.len()].into()),
        };
        Some(Row((0..5).map(cell).collect()))
    };
    let change = |n: usize| Change {
        table: table.clone(),
        operation: [Operation::Insert, Operation::Update, Operation::Delete][n % 3],
        new: if n % 3 == 2 { None } else { cells(n) },
        old: if n.is_multiple_of(3) { None } else { cells(n + 4) },
    };
    (0..13).map(change).collect()
}

#[test]
fn p7_no_filter_makes_the_server_panic_or_eat_memory() {
    for valid in CORPUS {
        let text = String::from_utf8_lossy(valid);
        Condition::parse_all(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
    }
    let table = table();
    let changes = changes(&table);
    let mut mutator = Mutator::new(&CORPUS, &WORDS);
    let (mut read, mut refused, mut matches) = (0_u64, 0_u64, 0_u64);
    let mut out = Vec::new();
    for n in 0..cases(1_000_000) {
        let bytes = mutator.injured();
        let text = String::from_utf8_lossy(&bytes);
        let region = Region::new(ALLOCATOR);
        let parsed = Condition::parse_all(&text);
        let allocated = region.change().bytes_allocated;
        assert!(allocated <= (16 << 10) + 128 * text.len(), "{allocated} bytes for {}: {text}", text.len());
        match parsed {
            Ok(conditions) => {
                read += 1;
                // A name with a quote in it has no form of its own; no such column passes the check at subscribe time.
                let plain = conditions.iter().all(|condition| !condition.column.contains(['"', '\\']));
                let written: Vec<String> = conditions.iter().map(Condition::to_string).collect();
                let again = Condition::parse_all(&written.join(","));
                assert!(!plain || again.as_ref() == Ok(&conditions), "{text} was written down as {}", written.join(","));
                if n % 8 == 0 {
                    let binding =
                        Binding::parse("*", Some("public"), Some("todos"), Some(&text), None).expect("it was read before");
                    let mut index = Index::default();
                    index.subscribe(SubscriptionId(1), checked(binding));
                    for change in &changes {
                        out.clear();
                        index.subscriptions(change, &mut out);
                        matches += out.len() as u64;
                    }
                    index.unsubscribe(SubscriptionId(1));
                    assert!(index.is_empty());
                }
            }
            Err(error) => {
                refused += 1;
                let told = error.to_string();
                assert!(told.starts_with("Error parsing `filter` params") && told.len() < 1_000, "{told}");
            }
        }
    }
    println!("{read} read, {refused} refused, {matches} matches");
    assert!(read > 1_000 && refused > 1_000 && matches > 1_000, "{read} read, {refused} refused, {matches} matches");
}
