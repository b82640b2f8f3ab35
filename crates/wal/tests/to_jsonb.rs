//! PostgreSQL is the judge: a value that came through a real slot, written by us, must equal PostgreSQL's own `to_jsonb`.

mod decoded;

use decoded::{Decoded, changes};
use walcast_model::ValueKind;
use walcast_protocol::{builtin_types::value_kind_of_builtin, value::write_value};

const TYPES: &str = "
create type mood as enum ('sad', 'so \"so\"', 'happy, ''really''');
create domain posint as int check (value > 0);
create domain bigger as posint check (value > 10);
create domain words as text[];
create domain doc as jsonb;
create domain moment as timestamptz;
create type floats as range (subtype = float8);
create type address as (street text, no int);
";

/// Each type with its awkward values, as literals between `$w$`.
const VALUES: &[(&str, &[&str])] = &[
    ("bool", &["t", "f"]),
    ("int2", &["-32768", "0"]),
    ("int4", &["2147483647"]),
    ("int8", &["-9223372036854775808", "9007199254740993"]),
    ("float4", &["0.1", "1e-30", "3.4e38", "NaN", "-Infinity", "-0"]),
    ("float8", &["0.1", "1e-7", "1e300", "-1.7976931348623157e308", "5e-324", "NaN", "Infinity", "-0", "123456789012345680"]),
    (
        "numeric",
        &[
            "0.10",
            "1e-10",
            "123456789012345678901234567890.123456789012345678901234567890",
            "NaN",
            "Infinity",
            "-Infinity",
            "1e400",
        ],
    ),
    ("numeric(10,2)", &["1", "-0.005"]),
    ("money", &["-1234.5"]),
    ("oid", &["4294967295"]),
    ("text", &["", " ", "é 漢字 🙂", "a\"b\\c/d", "line\nline\r\ttab", "\u{1}\u{7f}\u{2028}", "NULL", "{}"]),
    ("varchar(5)", &["ab"]),
    ("char(5)", &["ab"]),
    ("\"char\"", &["1", "\""]),
    ("name", &["weird \"name\""]),
    ("bytea", &["", "\\x00ff0a", "ab\\\\c"]),
    ("json", &["{ \"b\" : 1.00,\n \"a\":[1 ,  2 ], \"b\":\"x  \\\" \\\\ y\"}", "null", "\"\"", " 1e5 ", "[]", "\"\\u00e9\\n\""]),
    ("jsonb", &["{\"b\": {\"c\": [1, {\"d\": null}, \"e  f\"]}, \"\": \"\\\\\"}", "null", "\"x\"", "1.50", "{}", "[[], {}]"]),
    ("jsonpath", &["$.a[*] ? (@ > 1)"]),
    ("date", &["2024-02-29", "infinity", "-infinity", "0044-03-15 BC", "12345-01-01"]),
    ("time", &["00:00:00", "24:00:00", "12:34:56.7"]),
    ("timetz", &["12:00+05:30", "12:00:00.5-08"]),
    (
        "timestamp",
        &[
            "2024-05-06 07:08:09",
            "2024-05-06 07:08:09.000001",
            "infinity",
            "-infinity",
            "0044-03-15 10:00:00.5 BC",
            "294276-12-31 23:59:59",
        ],
    ),
    (
        "timestamptz",
        &[
            "2024-05-06 07:08:09+02",
            "2024-05-06 07:08:09.5-03:30",
            "infinity",
            "-infinity",
            "0044-03-15 10:00 BC",
            "12345-01-01 00:00+00",
        ],
    ),
    ("interval", &["1 year -2 days +03:04:05.678", "0", "-1 mon", "PT1H"]),
    ("uuid", &["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"]),
    ("xml", &["<a b=\"c\">d\n</a>"]),
    ("bit(5)", &["10101"]),
    ("varbit", &["", "1"]),
    ("inet", &["10.0.0.1/8", "::1"]),
    ("cidr", &["10.0.0.0/8"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    ("point", &["(1.5,-2)"]),
    ("line", &["{1,2,3}"]),
    ("lseg", &["[(0,0),(1,1)]"]),
    ("box", &["(2,2),(1,1)"]),
    ("path", &["((0,0),(1,1))", "[(0,0),(1,1)]"]),
    ("polygon", &["((0,0),(1,1),(2,0))"]),
    ("circle", &["<(1,2),3>"]),
    ("tsvector", &["a:1A 'b c':2"]),
    ("tsquery", &["'a b' & !c"]),
    ("pg_lsn", &["16/B374D848"]),
    ("pg_snapshot", &["10:20:10,14"]),
    ("xid", &["7"]),
    ("xid8", &["18446744073709551615"]),
    ("tid", &["(0,1)"]),
    ("regclass", &["pg_class"]),
    ("regtype", &["timestamp with time zone"]),
    ("int2vector", &["1 2 3", ""]),
    ("oidvector", &["1 2"]),
    ("int4range", &["[1,5)", "empty", "(,)"]),
    ("numrange", &["[1.5,2.50]"]),
    ("tstzrange", &["[2024-01-01 00:00+00,infinity)"]),
    ("daterange", &["[2024-01-01,)"]),
    ("int4multirange", &["{[1,2),[5,9)}", "{}"]),
    ("floats", &["[1.5,2)"]),
    ("mood", &["so \"so\"", "happy, 'really'"]),
    ("posint", &["7"]),
    ("bigger", &["11"]),
    ("words", &["{}", "{a,\"b c\",NULL}"]),
    ("doc", &["{\"a\": 1}"]),
    ("moment", &["2024-05-06 07:08:09+02"]),
    ("bool[]", &["{t,f,NULL}"]),
    ("int4[]", &["{}", "{1,NULL,-3}", "{{1,2},{3,4}}", "[0:1]={5,6}", "[0:1][-1:0]={{1,2},{3,4}}", "{{{{{{1}}}}}}"]),
    ("float8[]", &["{NaN,Infinity,1e-7,-0}"]),
    ("text[]", &["{\"\",\" \",NULL,\"NULL\",null,\"a\\\"b\\\\c\",\"{,}\",é漢🙂}", "{{\"a,b\",c},{\"\\n\",\"}\"}}"]),
    ("varchar[]", &["{abc}"]),
    ("bytea[]", &["{\"\\\\x00ff\",NULL}"]),
    ("json[]", &["{\"{\\\"a\\\" : [1, 2]}\",NULL,\"null\",1}"]),
    ("jsonb[]", &[r#"{"{\"a\": \"x\\\"y\"}","\"s\"",NULL,"null"}"#]),
    ("date[]", &["{2024-02-29,infinity,\"0044-03-15 BC\"}"]),
    ("timestamp[]", &["{\"2024-05-06 07:08:09.5\",-infinity}"]),
    ("timestamptz[]", &["{\"2024-05-06 07:08:09+02\",infinity,\"0044-03-15 10:00+00 BC\"}"]),
    ("uuid[]", &["{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11}"]),
    ("numeric[]", &["{1.50,NaN}"]),
    ("interval[]", &["{\"1 day 02:03:04\"}"]),
    ("point[]", &["{\"(1,2)\",\"(3,4)\"}"]),
    ("box[]", &["{(2,2),(1,1);(4,4),(3,3)}", "{}"]),
    ("int4range[]", &["{\"[1,5)\",empty}"]),
    ("int2vector[]", &["{\"1 2\",3}"]),
    ("mood[]", &["{sad,\"so \\\"so\\\"\",\"happy, 'really'\"}"]),
    ("posint[]", &["{1,2}"]),
    ("words[]", &["{\"{a,\\\"b c\\\"}\",\"{}\"}"]),
    ("doc[]", &["{\"{\\\"a\\\": [1, 2]}\"}"]),
];

fn is_bytea(kind: &ValueKind) -> bool {
    *kind == ValueKind::Bytea
}

#[tokio::test]
async fn our_json_of_every_type_is_that_of_to_jsonb() {
    let mut schema = TYPES.to_owned();
    for (number, (type_name, _)) in VALUES.iter().enumerate() {
        schema.push_str(&format!("create table t{number} (id int primary key, v {type_name});"));
    }
    let mut decoded = Decoded::start(&schema).await;
    let mut wrong = Vec::new();
    for (number, (type_name, values)) in VALUES.iter().enumerate() {
        let rows: Vec<_> = values.iter().enumerate().map(|(id, value)| format!("({id}, $w${value}$w$)")).collect();
        let commit = decoded.commit_of(&format!("insert into t{number} values {}, (-1, null)", rows.join(", "))).await;
        assert_eq!(changes(&commit).len(), values.len() + 1);
        for change in changes(&commit).into_iter().take(values.len()) {
            let column = &change.table.columns[1];
            let row = change.new.as_ref().unwrap();
            let (id, text) = (row.cell(0).text().unwrap(), row.cell(1).text().unwrap());
            let mut written = Vec::new();
            write_value(&column.kind, text, &mut written);
            let written = String::from_utf8(written).unwrap();
            assert!(!written.contains(['\n', '\r']), "{type_name}: {written}");
            let expected = if is_bytea(&column.kind) { "to_jsonb(substr(v::text, 3))" } else { "to_jsonb(v)" };
            let sql = format!("select {expected} = $1::text::jsonb, {expected}::text from t{number} where id = {id}");
            let answer = decoded.client.query_one(&sql, &[&written]).await.unwrap_or_else(|error| panic!("{written}: {error:?}"));
            if !answer.get::<_, bool>(0) {
                wrong.push(format!("{type_name} {text}: {written} and not {}", answer.get::<_, String>(1)));
            }
        }
        let null = changes(&commit).into_iter().next_back().unwrap();
        assert_eq!(*null.new.as_ref().unwrap().cell(1), walcast_model::Cell::Null, "{type_name}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn the_table_of_built_in_types_the_catalog_reader_and_the_server_agree() {
    let decoded = Decoded::start(TYPES).await;
    let sql = "select t.oid::int8, t.typname::text from pg_type t left join pg_type e on e.oid = t.typelem \
               where t.typnamespace = 'pg_catalog'::regnamespace and t.typtype in ('b', 'r', 'm') \
               and coalesce(e.typtype, 'b') not in ('c', 'p')";
    let types: Vec<(u32, String)> =
        decoded.client.query(sql, &[]).await.unwrap().iter().map(|row| (row.get::<_, i64>(0) as u32, row.get(1))).collect();
    assert!(types.len() > 150);
    let oids: Vec<u32> = types.iter().map(|(oid, _)| *oid).collect();
    let kinds = decoded.catalog.kinds(&oids).await.unwrap();
    for (oid, name) in &types {
        let (kind, builtin_name) = value_kind_of_builtin(*oid).unwrap_or_else(|| panic!("{name} ({oid}) is missing"));
        assert_eq!(builtin_name, name);
        assert_eq!(kinds[oid], (name.clone(), kind), "{name}");
    }
}

#[tokio::test]
async fn what_only_postgresql_can_tell_is_read_back() {
    let decoded = Decoded::start(
        "create type address as (street text, no int); create domain home as address; create type box2;
         create function box2_in(cstring) returns box2 language internal immutable strict as 'textin';
         create function box2_out(box2) returns cstring language internal immutable strict as 'textout';
         create type box2 (input = box2_in, output = box2_out, like = text);
         create function box2_json(box2) returns json language sql immutable as 'select to_json(1)';
         create cast (box2 as json) with function box2_json(box2)",
    )
    .await;
    for name in ["address", "address[]", "home", "box2", "box2[]", "record"] {
        let oid = decoded.client.query_one("select $1::text::regtype::oid", &[&name]).await.unwrap().get::<_, u32>(0);
        assert_eq!(decoded.catalog.kinds(&[oid]).await.unwrap()[&oid].1, ValueKind::ReadBack, "{name}");
        assert_eq!(value_kind_of_builtin(oid), None, "{name}");
    }
}
