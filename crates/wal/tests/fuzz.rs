//! Whatever bytes come as pgoutput: decoded, or refused with the place and the reason. Never a panic, never more memory
//! than a small multiple of what came.

use std::alloc::System;

use bytes::Bytes;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use walcast_model::{Column, Table, TableId, TableName, ValueKind};
use walcast_testkit::mutate::{Mutator, cases};
use walcast_wal::{
    assemble::{Assembler, Step},
    pgoutput::{Message, decode},
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// One of each kind, as PostgreSQL sends them.
const CORPUS: [&[u8]; 13] = [
    b"B\0\0\0\0\x01\x02\x03\x04\0\x02\x9e\x11\x22\x33\x44\x55\0\0\x02\xf1",
    b"C\0\0\0\0\0\x01\x02\x03\x04\0\0\0\0\x01\x02\x03\x34\0\x02\x9e\x11\x22\x33\x44\x55",
    b"O\0\0\0\0\x01\x02\x03\x04origin\0",
    b"R\0\0\x40\0public\0patients\0d\0\x03\x01id\0\0\0\0\x14\xff\xff\xff\xff\0name\0\0\0\0\x19\xff\xff\xff\xff\0note\0\0\0\0\x19\xff\xff\xff\xff",
    b"R\0\0\x40\0public\0patients\0f\0\x01\x01id\0\0\0\0\x14\xff\xff\xff\xff",
    b"Y\0\0\x40\x01public\0mood\0",
    b"I\0\0\x40\0N\0\x03t\0\0\0\x017t\0\0\0\x03Adan",
    b"U\0\0\x40\0N\0\x03t\0\0\0\x017t\0\0\0\x04Adaeu",
    b"U\0\0\x40\0K\0\x03t\0\0\0\x016nnN\0\x03t\0\0\0\x017t\0\0\0\x03Adan",
    b"U\0\0\x40\0O\0\x03t\0\0\0\x017t\0\0\0\x03AdanN\0\x03t\0\0\0\x017t\0\0\0\x03Evan",
    b"D\0\0\x40\0K\0\x03t\0\0\0\x017nn",
    b"T\0\0\0\x01\x03\0\0\x40\0",
    b"M\x01\0\0\0\0\x01\x02\x03\x04walcast\0\0\0\0\x0c{\"beat\":1234",
];
const WORDS: [&[u8]; 9] =
    [b"N\0\x01", b"K\0\0", b"O\x7f\xff", b"t\x7f\xff\xff\xff", b"t\xff\xff\xff\xff", b"u", b"n", b"\0\0\x40\0", b"b\0\0\0\x01x"];

#[test]
fn p7_no_bytes_from_the_wal_make_the_decoder_panic_or_eat_memory() {
    for (at, valid) in CORPUS.iter().enumerate() {
        decode(&Bytes::from_static(valid)).unwrap_or_else(|error| panic!("corpus {at}: {error}"));
    }
    let mut mutator = Mutator::new(&CORPUS, &WORDS);
    let (mut read, mut refused) = (0_u64, 0_u64);
    let mut assembler = Assembler::new(64 << 10);
    for _ in 0..cases(1_000_000) {
        let bytes = Bytes::from(mutator.injured());
        let region = Region::new(ALLOCATOR);
        let decoded = decode(&bytes);
        let allocated = region.change().bytes_allocated;
        assert!(allocated <= 4_096 + 64 * bytes.len(), "{allocated} bytes for {}: {bytes:?}", bytes.len());
        match decoded {
            Ok(message) => {
                read += 1;
                // What can be read may still make no sense in its order.
                if !assembled(&mut assembler, message) {
                    assembler = Assembler::new(64 << 10);
                }
            }
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("at byte"), "{error}");
            }
        }
    }
    println!("{read} read, {refused} refused");
    assert!(read > refused / 50 && refused > read / 50, "{read} read, {refused} refused: the inputs test one side only");
}

/// False: it was refused, and a new one is needed.
fn assembled(assembler: &mut Assembler, message: Message) -> bool {
    match assembler.push(message) {
        Ok(Step::NeedsTable(relation)) => {
            let column = |column: &walcast_wal::pgoutput::RelationColumn| Column {
                name: column.name.clone(),
                type_oid: column.type_oid,
                type_name: "text".into(),
                kind: ValueKind::Text,
                key: column.key,
                tagged: column.key,
            };
            let columns = relation.columns.iter().map(column).collect();
            let name = TableName::new(&relation.schema, &relation.table);
            assembler.define(Table { id: TableId(relation.id), name, identity: relation.identity, columns }).is_ok()
        }
        Ok(_) => true,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}
