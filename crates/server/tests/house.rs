//! The house: rooms never import each other, and the ground floor knows nothing of the rooms above it.
//! Read from `cargo metadata`, so a forbidden edge fails whoever adds it.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use serde_json::Value;

/// Package and what it may use; dev-dependencies are not edges of the house.
const HOUSE: [(&str, &[&str]); 14] = [
    ("model", &[]),
    ("cluster", &[]),
    ("pg", &["model"]),
    ("protocol", &["model"]),
    ("wal", &["model", "pg"]),
    ("matcher", &["model"]),
    ("auth", &["model", "pg"]),
    ("cache", &["model", "pg"]),
    ("hub", &["model", "protocol"]),
    ("query", &["model", "pg"]),
    ("engine", &["model", "pg", "protocol", "wal", "matcher", "auth", "cache", "hub", "query"]),
    ("server", &["engine", "protocol", "cluster"]),
    ("testkit", &["model", "protocol", "cluster"]),
    ("bench", &["model", "pg", "protocol", "auth", "cache", "testkit"]),
];

fn edges() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let short = |name: &str| name.strip_prefix("walcast-").map(str::to_owned);
    let mut edges = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let name = short(package["name"].as_str().expect("a name")).expect("packages begin with walcast-");
        let used = package["dependencies"].as_array().expect("dependencies").iter();
        let used = used.filter(|used| used["kind"].is_null()).filter_map(|used| short(used["name"].as_str()?)).collect();
        edges.insert(name, used);
    }
    edges
}

/// Every edge of `edges` that the house does not have.
fn forbidden(edges: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = HOUSE.into_iter().collect();
    let mut found = Vec::new();
    for (package, used) in edges {
        match allowed.get(package.as_str()) {
            None => found.push(format!("{package} has no place in the house")),
            Some(may) => found.extend(used.iter().filter(|u| !may.contains(&u.as_str())).map(|u| format!("{package} -> {u}"))),
        }
    }
    found
}

#[test]
fn no_room_imports_another() {
    assert_eq!(forbidden(&edges()), Vec::<String>::new());
}

#[test]
fn a_forbidden_edge_is_caught() {
    let mut edges = edges();
    edges.get_mut("cache").expect("the cache").insert("wal".into());
    edges.insert("utils".into(), BTreeSet::new());
    assert_eq!(forbidden(&edges), ["cache -> wal", "utils has no place in the house"]);
}
