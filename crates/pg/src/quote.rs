//! Identifiers and literals for SQL that cannot take parameters (SET, EXPLAIN, generated policies).

/// `"a""b"`: always quoted, so that case and keywords do not matter.
pub fn quote_ident(name: &str) -> String {
    format!("\"{}\"", name.replace('\0', "").replace('"', "\"\""))
}

/// `'it''s'`, as an escape string where a backslash is inside, so that `standard_conforming_strings` does not matter.
pub fn quote_literal(value: &str) -> String {
    let value = value.replace('\0', "").replace('\'', "''");
    if value.contains('\\') { format!(" E'{}'", value.replace('\\', "\\\\")) } else { format!("'{value}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_gets_out_of_its_quotes() {
        assert_eq!(quote_ident("a\"; drop table x; --"), "\"a\"\"; drop table x; --\"");
        assert_eq!(quote_literal("o'hara"), "'o''hara'");
        assert_eq!(quote_literal("\\'"), " E'\\\\'''");
    }
}
