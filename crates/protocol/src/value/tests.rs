use bytes::Bytes;
use proptest::prelude::*;
use walcast_model::{Column, ReplicaIdentity, TableId, TableName};

use super::*;
use crate::builtin_types::value_kind_of_builtin;

fn json(oid: u32, text: &str) -> String {
    let mut out = Vec::new();
    write_value(&value_kind_of_builtin(oid).unwrap().0, text, &mut out);
    String::from_utf8(out).unwrap()
}

fn check(oid: u32, text: &str, expected: &str) {
    assert_eq!(json(oid, text), expected, "{text}");
}

#[test]
fn numbers_are_numbers_and_what_json_cannot_say_is_a_string() {
    check(16, "t", "true");
    check(16, "f", "false");
    check(23, "-7", "-7");
    check(701, "1e-07", "1e-07");
    check(701, "1.5e+300", "1.5e+300");
    check(701, "-Infinity", "\"-Infinity\"");
    check(1700, "NaN", "\"NaN\"");
    check(1700, "123456789012345678901234567890.10", "123456789012345678901234567890.10");
    for odd in ["", "-", "01", "1.", ".5", "1e", "1e+", "0x10", "1 ", "+1"] {
        check(1700, odd, &format!("\"{odd}\""));
    }
}

#[test]
fn json_loses_white_space_outside_of_strings_only() {
    check(3802, r#"{"a b": [1, 2, "x \" y \\"], "n": 1.00}"#, r#"{"a b":[1,2,"x \" y \\"],"n":1.00}"#);
    check(114, "\n{ \"b\" : 1,\r\n\t\"b\":\"\\n\" }\n", r#"{"b":1,"b":"\n"}"#);
}

#[test]
fn times() {
    check(1114, "2024-05-06 07:08:09.5", "\"2024-05-06T07:08:09.5\"");
    check(1184, "2024-05-06 07:08:09+00", "\"2024-05-06T07:08:09+00:00\"");
    check(1184, "2024-05-06 07:08:09-05:30", "\"2024-05-06T07:08:09-05:30\"");
    check(1184, "0044-03-15 10:00:00.5+00 BC", "\"0044-03-15T10:00:00.5+00:00 BC\"");
    check(1184, "infinity", "\"infinity\"");
    check(1114, "-infinity", "\"-infinity\"");
    check(1082, "0044-03-15 BC", "\"0044-03-15 BC\"");
    check(1266, "12:00:00+05:30", "\"12:00:00+05:30\"");
    check(1186, "1 day 02:03:04", "\"1 day 02:03:04\"");
    // Another DateStyle is not mistaken for ISO.
    check(1184, "Wed Dec 17 07:37:16 1997 UTC", "\"Wed Dec 17 07:37:16 1997 UTC\"");
    check(1114, "12/17/1997 07:37:16", "\"12/17/1997 07:37:16\"");
}

#[test]
fn bytea_is_bare_hex_in_either_setting() {
    check(17, r"\x00ff", "\"00ff\"");
    check(17, r"\x", "\"\"");
    check(17, r"a\000\\\377", "\"61005cff\"");
    check(1001, r#"{"\\x00ff",NULL}"#, r#"["\\x00ff",null]"#);
}

#[test]
fn arrays() {
    check(1007, "{}", "[]");
    check(1007, "{1,NULL,3}", "[1,null,3]");
    check(1007, "[0:1][-1:0]={{1,2},{3,4}}", "[[1,2],[3,4]]");
    check(1009, r#"{"a \"b\" \\",NULL,"NULL","","é,{}"}"#, r#"["a \"b\" \\",null,"NULL","","é,{}"]"#);
    check(1020, "{(1,1),(0,0);(2,2),(1,1)}", r#"["(1,1),(0,0)","(2,2),(1,1)"]"#);
    check(1115, r#"{"2024-05-06 07:08:09",infinity}"#, r#"["2024-05-06T07:08:09","infinity"]"#);
    check(3807, r#"{"{\"a\": 1}",NULL,"null","\"x\""}"#, r#"[{"a":1},null,null,"x"]"#);
    check(1022, "{NaN,1}", r#"["NaN",1]"#);
    check(22, "1 2 3", "[1,2,3]");
    check(30, "", "[]");
    check(1006, r#"{"1 2",3}"#, "[[1,2],[3]]");
}

#[test]
fn what_is_no_array_stays_a_string() {
    for odd in ["a b", "[1]", "{", "{1", "{1,}", "{1}}", "{,}", "{\"a", "{\"a\\", "{{{{{{{1}}}}}}}", "{{1}2}"] {
        check(1007, odd, &serde_json::to_string(odd).unwrap());
    }
}

fn table(columns: &[(&str, u32)]) -> Table {
    let columns = columns.iter().map(|(name, oid)| {
        let (kind, type_name) = value_kind_of_builtin(*oid).unwrap_or((ValueKind::ReadBack, "address"));
        Column { name: (*name).into(), type_oid: *oid, type_name: type_name.into(), kind, key: false, tagged: false }
    });
    Table { id: TableId(1), name: TableName::new("public", "t"), identity: ReplicaIdentity::Default, columns: columns.collect() }
}

fn value(text: &'static str) -> Cell {
    Cell::Value(Bytes::from_static(text.as_bytes()))
}

fn record(table: &Table, cells: Vec<Cell>, visible: &[bool]) -> String {
    let mut out = Vec::new();
    write_record(table, &Row(cells), visible, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn a_record_shows_what_is_known_and_allowed() {
    let table = table(&[("id", 20), ("a \"b\"", 25), ("c", 25), ("d", 25), ("e", 25)]);
    let cells = || vec![value("1"), value("x\ny"), Cell::Null, Cell::Unchanged, Cell::Absent];
    assert_eq!(record(&table, cells(), &[true; 5]), r#"{"id":1,"a \"b\"":"x\ny","c":null}"#);
    assert_eq!(record(&table, cells(), &[false, true, true, true, true]), r#"{"a \"b\"":"x\ny","c":null}"#);
    assert_eq!(record(&table, cells(), &[false; 5]), "{}");
}

#[test]
fn p3_a_column_of_which_nothing_was_said_is_not_shown() {
    let table = table(&[("id", 20), ("secret", 25)]);
    assert_eq!(record(&table, vec![value("1"), value("x")], &[true]), r#"{"id":1}"#);
    let mut out = Vec::new();
    write_columns(&table, &[true], &mut out);
    assert_eq!(out, br#"[{"name":"id","type":"int8"}]"#);
}

#[test]
fn what_cannot_be_read_is_left_out() {
    let table = table(&[("id", 20), ("home", 70_000), ("t", 25)]);
    let not_utf8 = Cell::Value(Bytes::from_static(b"\xff"));
    assert_eq!(record(&table, vec![value("1"), value("(a,b)"), not_utf8], &[true; 3]), r#"{"id":1}"#);
    let read_back = vec![value("1"), value(r#"{"street": "a"}"#), value("")];
    assert_eq!(record(&table, read_back, &[true; 3]), r#"{"id":1,"home":{"street":"a"},"t":""}"#);
}

#[test]
fn columns_carry_their_type_names() {
    let table = table(&[("id", 20), ("tags", 1009), ("a\"b", 1184)]);
    let mut out = Vec::new();
    write_columns(&table, &[true, false, true], &mut out);
    assert_eq!(out, br#"[{"name":"id","type":"int8"},{"name":"a\"b","type":"timestamptz"}]"#);
}

/// The text that PostgreSQL prints for an array, after the rules of its `array_out`.
fn array_out(items: &[Option<String>]) -> String {
    let quote = |item: &Option<String>| match item {
        None => "NULL".to_owned(),
        Some(text) => format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"")),
    };
    format!("{{{}}}", items.iter().map(quote).collect::<Vec<_>>().join(","))
}

proptest! {
    #[test]
    fn an_array_of_texts_comes_back_whole(items in prop::collection::vec(prop::option::of(any::<String>()), 0..6)) {
        let written: Vec<Option<String>> = serde_json::from_str(&json(1009, &array_out(&items))).unwrap();
        prop_assert_eq!(written, items);
    }

    /// JSON itself PostgreSQL has checked; all other kinds are safe against any text.
    #[test]
    fn any_text_becomes_one_line_of_json(text in any::<String>(), structured in "[\\[\\]{}\",;\\\\ :=nul0-9tTeE+.-]{0,24}") {
        for oid in [16, 23, 1700, 1082, 1114, 1184, 17, 25, 1007, 1009, 1001, 1020, 1185, 22, 1006] {
            for text in [&text, &structured] {
                let written = json(oid, text);
                prop_assert!(serde_json::from_str::<serde_json::Value>(&written).is_ok(), "{} from {:?}", written, text);
                prop_assert!(!written.contains('\n'));
            }
        }
    }
}
