//! Reads a plan as `EXPLAIN (VERBOSE, FORMAT JSON)` prints it: its relations, and every expression in it.

use serde_json::Value;

use crate::known::Reference;

#[derive(Debug, Default)]
pub(crate) struct Explained {
    pub relations: Vec<Reference>,
    pub expressions: Vec<String>,
}

/// Keys whose strings are names or words of EXPLAIN itself.
const NO_EXPRESSION: [&str; 14] = [
    "Node Type",
    "Relation Name",
    "Schema",
    "Alias",
    "Index Name",
    "Parent Relationship",
    "Join Type",
    "Strategy",
    "Scan Direction",
    "Command",
    "Subplan Name",
    "CTE Name",
    "Partial Mode",
    "Cache Mode",
];

impl Explained {
    pub fn read(plan: &Value) -> Explained {
        let mut explained = Explained::default();
        explained.node(plan);
        explained
    }

    fn node(&mut self, value: &Value) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| self.node(item)),
            Value::String(text) => self.expressions.push(text.clone()),
            Value::Object(map) => {
                let text = |key: &str| map.get(key).and_then(Value::as_str).map(str::to_owned);
                if let Some(relation) = text("Relation Name") {
                    self.relations.push((text("Schema"), relation));
                }
                if let Some(function) = text("Function Name") {
                    // As the lexer knows a call.
                    let schema = text("Schema").map(|schema| format!("\"{schema}\".")).unwrap_or_default();
                    self.expressions.push(format!("{schema}\"{function}\"()"));
                }
                let inner =
                    map.iter().filter(|(key, _)| !NO_EXPRESSION.contains(&key.as_str()) && key.as_str() != "Function Name");
                inner.for_each(|(_, value)| self.node(value));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relations_and_expressions_of_every_level() {
        let plan = serde_json::json!([{"Plan": {"Node Type": "Append", "Output": ["f(x)"], "Plans": [
            {"Node Type": "Seq Scan", "Relation Name": "t", "Schema": "s", "Filter": "(g(y) = 1)"},
            {"Node Type": "Function Scan", "Function Name": "h", "Schema": "public"}]}}]);
        let explained = Explained::read(&plan);
        assert_eq!(explained.relations, [(Some("s".to_owned()), "t".to_owned())]);
        assert_eq!(explained.expressions, ["f(x)", "(g(y) = 1)", "\"public\".\"h\"()"]);
    }
}
