//! How the values of PostgreSQL's own types become JSON, by type oid; these oids are the same in every database.
//!
//! The rule for all other types, which the catalog reader (`crates/pg`) follows, is that of `to_jsonb`:
//!
//! | type | kind |
//! |---|---|
//! | domain | that of its base type |
//! | enum, range, multirange | [`ValueKind::Text`] |
//! | true array (subscripted as one, so `int2vector` too, but not `point`) | [`ValueKind::Array`] of its element's kind, with the element's delimiter |
//! | array whose element is read back | [`ValueKind::ReadBack`] |
//! | composite, pseudo-type, or a type outside `pg_catalog` with a cast to json or jsonb | [`ValueKind::ReadBack`] |
//! | any other type | [`ValueKind::Text`] |
//!
//! So for a type of `pg_catalog` both must give the same answer; a test compares this table with a server's catalog.

use walcast_model::ValueKind;

use Shape::{Array, Bool, Bytea, Date, Json, Number, Text, Timestamp, Timestamptz};

#[derive(Clone, Copy)]
enum Shape {
    Bool,
    Number,
    Json,
    Date,
    Timestamp,
    Timestamptz,
    Bytea,
    Text,
    /// Of the type with this oid.
    Array(u32),
}

/// Kind and `pg_type.typname`; none for types that are not PostgreSQL's own, composites and pseudo-types.
pub fn value_kind_of_builtin(oid: u32) -> Option<(ValueKind, &'static str)> {
    let at = TYPES.binary_search_by_key(&oid, |(oid, ..)| *oid).ok()?;
    let (_, name, shape) = TYPES[at];
    Some((kind(shape)?, name))
}

fn kind(shape: Shape) -> Option<ValueKind> {
    Some(match shape {
        Bool => ValueKind::Bool,
        Number => ValueKind::Number,
        Json => ValueKind::Json,
        Date => ValueKind::Date,
        Timestamp => ValueKind::Timestamp,
        Timestamptz => ValueKind::Timestamptz,
        Bytea => ValueKind::Bytea,
        Text => ValueKind::Text,
        Array(element) => {
            let delimiter = if element == BOX { ';' } else { ',' };
            ValueKind::Array { element: Box::new(value_kind_of_builtin(element)?.0), delimiter }
        }
    })
}

/// The only type whose arrays are not separated by commas: its own text is full of them.
const BOX: u32 = 603;

/// In the order of their oids.
const TYPES: &[(u32, &str, Shape)] = &[
    (16, "bool", Bool),
    (17, "bytea", Bytea),
    (18, "char", Text),
    (19, "name", Text),
    (20, "int8", Number),
    (21, "int2", Number),
    (22, "int2vector", Array(21)),
    (23, "int4", Number),
    (24, "regproc", Text),
    (25, "text", Text),
    (26, "oid", Text),
    (27, "tid", Text),
    (28, "xid", Text),
    (29, "cid", Text),
    (30, "oidvector", Array(26)),
    (114, "json", Json),
    (142, "xml", Text),
    (143, "_xml", Array(142)),
    (194, "pg_node_tree", Text),
    (199, "_json", Array(114)),
    (271, "_xid8", Array(5069)),
    (600, "point", Text),
    (601, "lseg", Text),
    (602, "path", Text),
    (603, "box", Text),
    (604, "polygon", Text),
    (628, "line", Text),
    (629, "_line", Array(628)),
    (650, "cidr", Text),
    (651, "_cidr", Array(650)),
    (700, "float4", Number),
    (701, "float8", Number),
    (718, "circle", Text),
    (719, "_circle", Array(718)),
    (774, "macaddr8", Text),
    (775, "_macaddr8", Array(774)),
    (790, "money", Text),
    (791, "_money", Array(790)),
    (829, "macaddr", Text),
    (869, "inet", Text),
    (1000, "_bool", Array(16)),
    (1001, "_bytea", Array(17)),
    (1002, "_char", Array(18)),
    (1003, "_name", Array(19)),
    (1005, "_int2", Array(21)),
    (1006, "_int2vector", Array(22)),
    (1007, "_int4", Array(23)),
    (1008, "_regproc", Array(24)),
    (1009, "_text", Array(25)),
    (1010, "_tid", Array(27)),
    (1011, "_xid", Array(28)),
    (1012, "_cid", Array(29)),
    (1013, "_oidvector", Array(30)),
    (1014, "_bpchar", Array(1042)),
    (1015, "_varchar", Array(1043)),
    (1016, "_int8", Array(20)),
    (1017, "_point", Array(600)),
    (1018, "_lseg", Array(601)),
    (1019, "_path", Array(602)),
    (1020, "_box", Array(603)),
    (1021, "_float4", Array(700)),
    (1022, "_float8", Array(701)),
    (1027, "_polygon", Array(604)),
    (1028, "_oid", Array(26)),
    (1033, "aclitem", Text),
    (1034, "_aclitem", Array(1033)),
    (1040, "_macaddr", Array(829)),
    (1041, "_inet", Array(869)),
    (1042, "bpchar", Text),
    (1043, "varchar", Text),
    (1082, "date", Date),
    (1083, "time", Text),
    (1114, "timestamp", Timestamp),
    (1115, "_timestamp", Array(1114)),
    (1182, "_date", Array(1082)),
    (1183, "_time", Array(1083)),
    (1184, "timestamptz", Timestamptz),
    (1185, "_timestamptz", Array(1184)),
    (1186, "interval", Text),
    (1187, "_interval", Array(1186)),
    (1231, "_numeric", Array(1700)),
    (1266, "timetz", Text),
    (1270, "_timetz", Array(1266)),
    (1560, "bit", Text),
    (1561, "_bit", Array(1560)),
    (1562, "varbit", Text),
    (1563, "_varbit", Array(1562)),
    (1700, "numeric", Number),
    (1790, "refcursor", Text),
    (2201, "_refcursor", Array(1790)),
    (2202, "regprocedure", Text),
    (2203, "regoper", Text),
    (2204, "regoperator", Text),
    (2205, "regclass", Text),
    (2206, "regtype", Text),
    (2207, "_regprocedure", Array(2202)),
    (2208, "_regoper", Array(2203)),
    (2209, "_regoperator", Array(2204)),
    (2210, "_regclass", Array(2205)),
    (2211, "_regtype", Array(2206)),
    (2949, "_txid_snapshot", Array(2970)),
    (2950, "uuid", Text),
    (2951, "_uuid", Array(2950)),
    (2970, "txid_snapshot", Text),
    (3220, "pg_lsn", Text),
    (3221, "_pg_lsn", Array(3220)),
    (3361, "pg_ndistinct", Text),
    (3402, "pg_dependencies", Text),
    (3614, "tsvector", Text),
    (3615, "tsquery", Text),
    (3642, "gtsvector", Text),
    (3643, "_tsvector", Array(3614)),
    (3644, "_gtsvector", Array(3642)),
    (3645, "_tsquery", Array(3615)),
    (3734, "regconfig", Text),
    (3735, "_regconfig", Array(3734)),
    (3769, "regdictionary", Text),
    (3770, "_regdictionary", Array(3769)),
    (3802, "jsonb", Json),
    (3807, "_jsonb", Array(3802)),
    (3904, "int4range", Text),
    (3905, "_int4range", Array(3904)),
    (3906, "numrange", Text),
    (3907, "_numrange", Array(3906)),
    (3908, "tsrange", Text),
    (3909, "_tsrange", Array(3908)),
    (3910, "tstzrange", Text),
    (3911, "_tstzrange", Array(3910)),
    (3912, "daterange", Text),
    (3913, "_daterange", Array(3912)),
    (3926, "int8range", Text),
    (3927, "_int8range", Array(3926)),
    (4072, "jsonpath", Text),
    (4073, "_jsonpath", Array(4072)),
    (4089, "regnamespace", Text),
    (4090, "_regnamespace", Array(4089)),
    (4096, "regrole", Text),
    (4097, "_regrole", Array(4096)),
    (4191, "regcollation", Text),
    (4192, "_regcollation", Array(4191)),
    (4451, "int4multirange", Text),
    (4532, "nummultirange", Text),
    (4533, "tsmultirange", Text),
    (4534, "tstzmultirange", Text),
    (4535, "datemultirange", Text),
    (4536, "int8multirange", Text),
    (4600, "pg_brin_bloom_summary", Text),
    (4601, "pg_brin_minmax_multi_summary", Text),
    (5017, "pg_mcv_list", Text),
    (5038, "pg_snapshot", Text),
    (5039, "_pg_snapshot", Array(5038)),
    (5069, "xid8", Text),
    (6150, "_int4multirange", Array(4451)),
    (6151, "_nummultirange", Array(4532)),
    (6152, "_tsmultirange", Array(4533)),
    (6153, "_tstzmultirange", Array(4534)),
    (6155, "_datemultirange", Array(4535)),
    (6157, "_int8multirange", Array(4536)),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_under_its_oid() {
        assert!(TYPES.is_sorted_by(|a, b| a.0 < b.0));
        for (oid, name, _) in TYPES {
            assert_eq!(value_kind_of_builtin(*oid).unwrap().1, *name);
        }
        assert_eq!(value_kind_of_builtin(2249), None, "record");
        assert_eq!(value_kind_of_builtin(16_384), None, "somebody's own type");
    }

    #[test]
    fn arrays_know_their_elements() {
        let of = |element, delimiter| ValueKind::Array { element: Box::new(element), delimiter };
        assert_eq!(value_kind_of_builtin(1007).unwrap(), (of(ValueKind::Number, ','), "_int4"));
        assert_eq!(value_kind_of_builtin(1020).unwrap(), (of(ValueKind::Text, ';'), "_box"));
        assert_eq!(value_kind_of_builtin(1006).unwrap(), (of(of(ValueKind::Number, ','), ','), "_int2vector"));
    }
}
