//! What a query file may say, and what its author hears when it is wrong.

use super::*;

fn wrong(text: &str) -> String {
    NamedQuery::parse("queries/q.sql", text).unwrap_err().to_string()
}

#[test]
fn a_whole_header_is_read() {
    let text = "-- name: dashboard\n-- describe: what: the nurse sees\n-- param: patient_id bigint\n-- param: days int = 7\n\
                -- param: word text = 'it''s'\n-- ttl: 5m\n-- max_rows: 1_000\n-- roles: a, b\n-- max_age: 10s\n\
                -- depends: patients, audit.log\n\n-- just a comment\nselect $1, $2, $3;\n";
    let q = NamedQuery::parse("q.sql", text).unwrap();
    assert_eq!((q.name.as_str(), q.describe.as_deref()), ("dashboard", Some("what: the nurse sees")));
    assert_eq!(q.params[1], Param { name: "days".into(), type_name: "int".into(), default: Some("7".into()) });
    assert_eq!(q.params[2].default.as_deref(), Some("it's"));
    assert_eq!((q.ttl, q.max_rows, q.max_age), (Some(Duration::from_secs(300)), 1000, Some(Duration::from_secs(10))));
    assert!(q.allows("a") && !q.allows("c"));
    assert_eq!(q.depends, [TableName::new("public", "patients"), TableName::new("audit", "log")]);
    assert_eq!(q.sql, "select $1, $2, $3");
    assert!(q.parsed.is_some());
}

#[test]
fn durations() {
    for (text, seconds) in
        [("30s", 30), ("2h", 7200), ("1d", 86400), ("short", 30), ("medium", 300), ("long", 3600), ("very_long", 86400)]
    {
        let q = NamedQuery::parse("q.sql", &format!("-- name: q\n-- ttl: {text}\nselect 1")).unwrap();
        assert_eq!(q.ttl, Some(Duration::from_secs(seconds)), "{text}");
    }
    for text in ["5", "5 m", "m", "-1s", "0s", "5mm", "99999999999999999999d"] {
        assert!(wrong(&format!("-- name: q\n-- ttl: {text}\nselect 1")).contains("is not a duration"), "{text}");
    }
}

#[test]
fn every_mistake_names_its_line_and_its_mend() {
    let check = |text: &str, parts: &[&str]| {
        let error = wrong(text);
        parts.iter().for_each(|part| assert!(error.contains(part), "{error:?} lacks {part:?}"));
    };
    check("-- name: q\n-- tll: 5m\nselect 1", &["queries/q.sql:2:", "`tll`", "did you mean `ttl`?"]);
    check("-- name: q\n-- flavour: x\nselect 1", &["known are name, describe"]);
    check("select 1", &["no name"]);
    check("-- name: q\n-- name: r\nselect 1", &[":2:", "given twice"]);
    check("-- name: q\n-- param: a int\n-- param: a int\nselect $1, $2", &[":3:", "declared twice"]);
    check("-- name: q\n-- param: a\nselect $1", &["has no type"]);
    check("-- name: q\n-- param: a int) as (select 1\nselect $1", &["does not look like a type"]);
    check("-- name: q\n-- param: a int\nselect 1", &["`a` is declared, but $1 is not used"]);
    check("-- name: q\nselect $1", &["$1 is used, but 0 parameters"]);
    check("-- name: q\n-- max_rows: 0\nselect 1", &["number of rows"]);
    check("-- name: a b\nselect 1", &["cannot be a name"]);
    check("-- name: q\n", &["holds no query"]);
    check("-- name: q\ndelete from t", &["does not begin with SELECT"]);
    check("-- name: q\nselect 1; select 2", &["more than one statement"]);
    check("-- name: q\nwith x as (delete from t returning 1) select * from x", &["writes"]);
    check("-- name: q\nselect * from t for update", &["locks rows"]);
    check("-- name: q\nselect 1 into t", &["writes"]);
}

#[test]
fn a_folder_is_loaded_whole_or_tells_everything_that_is_wrong() {
    let dir = std::env::temp_dir().join(format!("walcast-queries-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("a.sql"), "-- name: a\nselect 1").unwrap();
    fs::write(dir.join("notes.txt"), "no query").unwrap();
    assert_eq!(load_dir(&dir).unwrap().len(), 1);
    fs::write(dir.join("b.sql"), "-- name: a\nselect 1").unwrap();
    fs::write(dir.join("c.sql"), "select 1").unwrap();
    fs::write(dir.join("d.sql"), " ".repeat((1 << 20) + 1)).unwrap();
    let errors: Vec<String> = load_dir(&dir).unwrap_err().iter().map(ToString::to_string).collect();
    assert_eq!(errors.len(), 3);
    assert!(errors[0].contains("second query") && errors[1].contains("no name") && errors[2].contains("at most 1 MiB"));
    fs::remove_dir_all(&dir).unwrap();
    assert!(load_dir(&dir).is_err());
}
