//! `/openapi.json`: every HTTP path, with all that it takes and answers.
//!
//! The document is kept by hand, in `openapi.json`, since what the handlers read (raw bodies, tickets, free query
//! parameters) is in no type that a macro could derive it from. Two things hold it to the truth: the test below compares
//! its paths and methods with the router's, and schemathesis asks a running server (`make -C tests openapi`).

use std::sync::LazyLock;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::Value;

const DOCUMENT: &str = include_str!("openapi.json");

pub async fn document() -> Response {
    static TEXT: LazyLock<String> = LazyLock::new(|| parsed().to_string());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}

fn parsed() -> Value {
    let mut document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    document
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// What a route may be described with; `elsewhere()` is all of them.
    const METHODS: [&str; 5] = ["delete", "get", "patch", "post", "put"];

    type Routes = BTreeMap<String, BTreeSet<String>>;

    /// As the source of the router says, since axum does not tell: each `.route("path", methods)`.
    fn routed() -> Routes {
        let source = include_str!("mod.rs");
        let body = &source[source.find("pub fn router(").unwrap()..];
        let body = &body[..body.find("\n}\n").unwrap()];
        let mut routes = Routes::new();
        for call in body.split(".route(").skip(1) {
            let path = call.split('"').nth(1).unwrap().replace("{*", "{");
            let handlers = call.split_once("\",").unwrap().1;
            let said = |method: &str| {
                let call = format!("{method}(");
                handlers.match_indices(&call).any(|(at, _)| !handlers[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
            };
            let methods: BTreeSet<String> =
                METHODS.into_iter().filter(|method| said("elsewhere") || said(method)).map(str::to_owned).collect();
            assert!(!methods.is_empty(), "no method found for {path}");
            assert!(routes.insert(path.clone(), methods).is_none(), "{path} is routed twice");
        }
        routes
    }

    /// Without HEAD, which is answered wherever GET is, and described where it has a use of its own. To the router the
    /// batches are keys, since a key may be called so; to everybody else they are paths.
    fn described() -> Routes {
        let mut routes = Routes::new();
        for (path, item) in parsed()["paths"].as_object().unwrap() {
            let path = path.replace("{namespace}/mget", "{namespace}/{key}").replace("{namespace}/mset", "{namespace}/{key}");
            let methods = item.as_object().unwrap().keys().filter(|key| *key != "parameters" && *key != "head").cloned();
            routes.entry(path).or_default().extend(methods);
        }
        routes
    }

    #[test]
    fn the_document_has_every_path_and_method_of_the_router_and_no_other() {
        assert_eq!(routed(), described(), "left: http/mod.rs, right: http/openapi.json");
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_operation_has_a_name_of_its_own() {
        fn walk<'a>(value: &'a Value, see: &mut impl FnMut(&'a str, &'a Value)) {
            match value {
                Value::Object(map) => map.iter().for_each(|(key, value)| {
                    see(key, value);
                    walk(value, see);
                }),
                Value::Array(items) => items.iter().for_each(|item| walk(item, see)),
                _ => {}
            }
        }
        let document = parsed();
        let mut names = BTreeSet::new();
        let mut referred = BTreeSet::new();
        walk(&document, &mut |key, value| match (key, value.as_str()) {
            ("$ref", Some(target)) => {
                assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
                referred.insert(target.to_owned());
            }
            ("operationId", Some(name)) => assert!(names.insert(name.to_owned()), "{name} names two operations"),
            _ => {}
        });
        for (kind, parts) in document["components"].as_object().unwrap().iter().filter(|(kind, _)| *kind != "securitySchemes") {
            for name in parts.as_object().unwrap().keys() {
                assert!(referred.contains(&format!("#/components/{kind}/{name}")), "nobody refers to {kind}/{name}");
            }
        }
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }
}
