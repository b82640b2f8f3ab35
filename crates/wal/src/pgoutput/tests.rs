//! A small encoder, written from PostgreSQL's documentation and not from the decoder, so that each checks the other.

use bytes::{BufMut, Bytes};
use proptest::{collection::vec, prelude::*};
use walcast_model::{Cell, Lsn, ReplicaIdentity, Row};

use super::{Fault, Message, OldImage, POSTGRES_EPOCH_US, Relation, RelationColumn, decode};

fn put_name(out: &mut Vec<u8>, name: &str) {
    out.put_slice(name.as_bytes());
    out.put_u8(0);
}

fn put_row(out: &mut Vec<u8>, tag: u8, row: &Row) {
    out.put_u8(tag);
    out.put_i16(row.0.len() as i16);
    for cell in &row.0 {
        match cell {
            Cell::Null => out.put_u8(b'n'),
            Cell::Unchanged => out.put_u8(b'u'),
            Cell::Value(value) => {
                out.put_u8(b't');
                out.put_i32(value.len() as i32);
                out.put_slice(value);
            }
            Cell::Absent => unreachable!("not on the wire"),
        }
    }
}

fn put_old(out: &mut Vec<u8>, old: &OldImage) {
    match old {
        OldImage::Key(row) => put_row(out, b'K', row),
        OldImage::Full(row) => put_row(out, b'O', row),
    }
}

fn put_relation(out: &mut Vec<u8>, relation: &Relation) {
    out.put_u8(b'R');
    out.put_u32(relation.id);
    put_name(out, &relation.schema);
    put_name(out, &relation.table);
    out.put_u8(match relation.identity {
        ReplicaIdentity::Default => b'd',
        ReplicaIdentity::Nothing => b'n',
        ReplicaIdentity::Full => b'f',
        ReplicaIdentity::Index => b'i',
    });
    out.put_i16(relation.columns.len() as i16);
    for column in &relation.columns {
        out.put_u8(u8::from(column.key));
        put_name(out, &column.name);
        out.put_u32(column.type_oid);
        out.put_i32(column.type_modifier);
    }
}

fn encode(message: &Message) -> Vec<u8> {
    let mut out = Vec::new();
    match message {
        Message::Begin { final_lsn, committed_at_us, xid } => {
            out.put_u8(b'B');
            out.put_u64(final_lsn.0);
            out.put_i64(committed_at_us - POSTGRES_EPOCH_US);
            out.put_u32(*xid);
        }
        Message::Commit { lsn, end_lsn, committed_at_us } => {
            out.put_slice(b"C\0");
            out.put_u64(lsn.0);
            out.put_u64(end_lsn.0);
            out.put_i64(committed_at_us - POSTGRES_EPOCH_US);
        }
        Message::Origin { lsn, name } => {
            out.put_u8(b'O');
            out.put_u64(lsn.0);
            put_name(&mut out, name);
        }
        Message::Relation(relation) => put_relation(&mut out, relation),
        Message::Type { oid, schema, name } => {
            out.put_u8(b'Y');
            out.put_u32(*oid);
            put_name(&mut out, schema);
            put_name(&mut out, name);
        }
        Message::Insert { relation, new } => {
            out.put_u8(b'I');
            out.put_u32(*relation);
            put_row(&mut out, b'N', new);
        }
        Message::Update { relation, old, new } => {
            out.put_u8(b'U');
            out.put_u32(*relation);
            if let Some(old) = old {
                put_old(&mut out, old);
            }
            put_row(&mut out, b'N', new);
        }
        Message::Delete { relation, old } => {
            out.put_u8(b'D');
            out.put_u32(*relation);
            put_old(&mut out, old);
        }
        Message::Truncate { relations, cascade, restart_identity } => {
            out.put_u8(b'T');
            out.put_u32(relations.len() as u32);
            out.put_u8(u8::from(*cascade) | u8::from(*restart_identity) << 1);
            relations.iter().for_each(|relation| out.put_u32(*relation));
        }
        Message::Message { transactional, lsn, prefix, content } => {
            out.put_u8(b'M');
            out.put_u8(u8::from(*transactional));
            out.put_u64(lsn.0);
            put_name(&mut out, prefix);
            out.put_u32(content.len() as u32);
            out.put_slice(content);
        }
    }
    out
}

fn name() -> impl Strategy<Value = std::sync::Arc<str>> {
    "[a-zé \"]{1,12}".prop_map(|name| name.into())
}

fn row() -> impl Strategy<Value = Row> {
    let cell = prop_oneof![
        Just(Cell::Null),
        Just(Cell::Unchanged),
        vec(any::<u8>(), 0..40).prop_map(|value| Cell::Value(Bytes::from(value))),
    ];
    vec(cell, 0..12).prop_map(Row)
}

fn old() -> impl Strategy<Value = OldImage> {
    prop_oneof![row().prop_map(OldImage::Key), row().prop_map(OldImage::Full)]
}

fn relation() -> impl Strategy<Value = Message> {
    use ReplicaIdentity::{Default, Full, Index, Nothing};
    let identity = prop_oneof![Just(Default), Just(Nothing), Just(Full), Just(Index)];
    let column = (name(), any::<u32>(), any::<i32>(), any::<bool>())
        .prop_map(|(name, type_oid, type_modifier, key)| RelationColumn { name, type_oid, type_modifier, key });
    (any::<u32>(), name(), name(), identity, vec(column, 0..8))
        .prop_map(|(id, schema, table, identity, columns)| Message::Relation(Relation { id, schema, table, identity, columns }))
}

fn message() -> impl Strategy<Value = Message> {
    let lsn = || any::<u64>().prop_map(Lsn);
    let time = || i64::MIN / 2..i64::MAX / 2;
    prop_oneof![
        (lsn(), time(), any::<u32>()).prop_map(|(final_lsn, committed_at_us, xid)| Message::Begin {
            final_lsn,
            committed_at_us,
            xid
        }),
        (lsn(), lsn(), time()).prop_map(|(lsn, end_lsn, committed_at_us)| Message::Commit { lsn, end_lsn, committed_at_us }),
        (lsn(), name()).prop_map(|(lsn, name)| Message::Origin { lsn, name }),
        relation(),
        (any::<u32>(), name(), name()).prop_map(|(oid, schema, name)| Message::Type { oid, schema, name }),
        (any::<u32>(), row()).prop_map(|(relation, new)| Message::Insert { relation, new }),
        (any::<u32>(), proptest::option::of(old()), row()).prop_map(|(relation, old, new)| Message::Update {
            relation,
            old,
            new
        }),
        (any::<u32>(), old()).prop_map(|(relation, old)| Message::Delete { relation, old }),
        (vec(any::<u32>(), 0..5), any::<bool>(), any::<bool>())
            .prop_map(|(relations, cascade, restart_identity)| { Message::Truncate { relations, cascade, restart_identity } }),
        (any::<bool>(), lsn(), name(), vec(any::<u8>(), 0..60)).prop_map(|(transactional, lsn, prefix, content)| {
            Message::Message { transactional, lsn, prefix, content: content.into() }
        }),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_is_what_is_read(message in message()) {
        prop_assert_eq!(decode(&encode(&message).into()).unwrap(), message);
    }

    #[test]
    fn a_message_cut_short_anywhere_is_an_error(message in message(), cut in any::<prop::sample::Index>()) {
        let whole = encode(&message);
        let part = Bytes::from(whole).slice(..cut.index(encode(&message).len()));
        prop_assert!(decode(&part).is_err());
    }

    #[test]
    fn anything_behind_a_message_is_an_error(message in message(), extra in vec(any::<u8>(), 1..4)) {
        let mut bytes = encode(&message);
        bytes.extend(extra);
        prop_assert!(decode(&bytes.into()).is_err());
    }

    #[test]
    fn random_bytes_never_panic(tag in prop::sample::select(b"BCORYIUDTM?".to_vec()), rest in vec(any::<u8>(), 0..200)) {
        let mut bytes = vec![tag];
        bytes.extend(rest);
        let _ = decode(&bytes.into());
    }

    #[test]
    fn a_changed_byte_never_panics(message in message(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = encode(&message);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = decode(&bytes.into());
    }
}

fn check(bytes: &'static [u8], fault: Fault) {
    let error = decode(&Bytes::from_static(bytes)).unwrap_err();
    assert_eq!(error.fault, fault, "{error}");
}

#[test]
fn every_fault_is_named() {
    check(b"", Fault::CutShort { wanted: 1, left: 0 });
    check(b"S\0\0\0\x01\x01", Fault::MessageTag(b'S'));
    check(b"B\0\0", Fault::CutShort { wanted: 8, left: 2 });
    check(b"C\x01", Fault::Flags(1));
    check(b"Y\0\0\0\x01public", Fault::Unterminated);
    check(b"Y\0\0\0\x01\xff\0t\0", Fault::NotUtf8);
    check(b"R\0\0\0\x01s\0t\0x\0\0", Fault::Identity(b'x'));
    check(b"R\0\0\0\x01s\0t\0d\xff\xff", Fault::Negative(-1));
    check(b"R\0\0\0\x01s\0t\0d\x7f\xff", Fault::CutShort { wanted: 327_670, left: 0 });
    check(b"I\0\0\0\x01K\0\0", Fault::ImageTag(b'K'));
    check(b"D\0\0\0\x01N\0\0", Fault::ImageTag(b'N'));
    check(b"U\0\0\0\x01K\0\0O\0\0", Fault::ImageTag(b'O'));
    check(b"I\0\0\0\x01N\0\x01b\0\0\0\x01x", Fault::Binary);
    check(b"I\0\0\0\x01N\0\x01z", Fault::CellTag(b'z'));
    check(b"I\0\0\0\x01N\0\x01t\x7f\xff\xff\xffx", Fault::CutShort { wanted: 0x7fff_ffff, left: 1 });
    check(b"I\0\0\0\x01N\0\x01t\xff\xff\xff\xffx", Fault::Negative(-1));
    check(b"T\x7f\xff\xff\xff\0", Fault::CutShort { wanted: 0x1_ffff_fffc, left: 1 });
    check(b"T\0\0\0\x01\0\0\0\0\x01!", Fault::LeftOver(1));
    check(b"B\0\0\0\0\0\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\x01", Fault::Time(i64::MAX));
}

#[test]
fn an_error_says_where_and_how_to_mend_it() {
    let error = decode(&Bytes::from_static(b"I\0\0\0\x01N\0\x01b\0\0\0\x01x")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a pgoutput Insert message is malformed at byte 8: a value is binary; start the stream without the option `binary`"
    );
}

#[test]
fn values_are_slices_of_the_message_and_the_own_schema_has_its_name() {
    let bytes = Bytes::from(b"I\0\0\0\x01N\0\x01t\0\0\0\x05hello".to_vec());
    let Message::Insert { new, .. } = decode(&bytes).unwrap() else { panic!("an insert") };
    let Cell::Value(value) = new.cell(0) else { panic!("a value") };
    assert_eq!(value.as_ptr(), bytes[13..].as_ptr());

    let Message::Type { schema, .. } = decode(&Bytes::from_static(b"Y\0\0\0\x01\0t\0")).unwrap() else { panic!("a type") };
    assert_eq!(&*schema, "pg_catalog");
}
