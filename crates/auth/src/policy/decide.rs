//! A bound policy on a row image, with SQL's three values and one more: that the image does not hold what is needed.

use std::cmp::Ordering;

use walcast_model::{Cell, Family, Row, Table};

use super::{BoundPolicy, Given, Node, Operand, Relation};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Allow,
    Deny,
    /// The image lacks a value that decides.
    Lacking,
    /// These values cannot be compared here.
    Ask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    True,
    False,
    Null,
    Lacking,
    Ask,
}

/// What an operand comes to: its text, and whether and how it compares.
enum Operated<'a> {
    Text(&'a str, Family),
    Null,
    Lacking,
    Ask,
}

impl BoundPolicy {
    pub fn decide(&self, table: &Table, row: &Row) -> Answer {
        match self.node(&self.root, table, row) {
            Truth::True => Answer::Allow,
            Truth::False | Truth::Null => Answer::Deny,
            Truth::Lacking => Answer::Lacking,
            Truth::Ask => Answer::Ask,
        }
    }

    fn node(&self, node: &Node, table: &Table, row: &Row) -> Truth {
        match node {
            Node::And(parts) => fold(parts.iter().map(|part| self.node(part, table, row)), Truth::False, Truth::True),
            Node::Or(parts) => fold(parts.iter().map(|part| self.node(part, table, row)), Truth::True, Truth::False),
            Node::Not(inner) => match self.node(inner, table, row) {
                Truth::True => Truth::False,
                Truth::False => Truth::True,
                other => other,
            },
            Node::Is(inner, wanted) => match self.node(inner, table, row) {
                Truth::True => truth(*wanted),
                Truth::False => truth(!*wanted),
                Truth::Null => Truth::False,
                other => other,
            },
            Node::IsNull(operand) => match self.operand(operand, table, row) {
                Operated::Text(..) => Truth::False,
                Operated::Null => Truth::True,
                Operated::Lacking => Truth::Lacking,
                Operated::Ask => Truth::Ask,
            },
            Node::Compare(left, relation, right) => {
                compare(self.operand(left, table, row), *relation, self.operand(right, table, row))
            }
            Node::Among { operand, list, negated } => {
                let found = self.among(self.operand(operand, table, row), list);
                match (found, negated) {
                    (Truth::True, true) => Truth::False,
                    (Truth::False, true) => Truth::True,
                    (found, _) => found,
                }
            }
            Node::Bool(operand) => match self.operand(operand, table, row) {
                Operated::Text("t", Family::Bool) => Truth::True,
                Operated::Text("f", Family::Bool) => Truth::False,
                Operated::Null => Truth::Null,
                Operated::Lacking => Truth::Lacking,
                Operated::Text(..) | Operated::Ask => Truth::Ask,
            },
        }
    }

    fn operand<'a>(&'a self, operand: &'a Operand, table: &Table, row: &'a Row) -> Operated<'a> {
        match operand {
            Operand::Column(name, family) => {
                let Some((index, _)) = table.column(name) else { return Operated::Lacking };
                match row.cell(index) {
                    Cell::Null => Operated::Null,
                    Cell::Unchanged | Cell::Absent => Operated::Lacking,
                    cell @ Cell::Value(_) => cell.text().map_or(Operated::Ask, |text| Operated::Text(text, *family)),
                }
            }
            Operand::Asked(at) => match self.values.0.get(*at) {
                Some(Given { values: None, .. }) => Operated::Null,
                Some(Given { type_name, values: Some(values) }) => match (values.as_slice(), family_of(type_name)) {
                    ([Some(text)], Some(family)) => Operated::Text(text, family),
                    _ => Operated::Ask,
                },
                None => Operated::Ask,
            },
        }
    }

    fn among(&self, operand: Operated<'_>, list: &[Operand]) -> Truth {
        let [Operand::Asked(at)] = list else { return Truth::Ask };
        let Some(given) = self.values.0.get(*at) else { return Truth::Ask };
        // The array itself is null.
        let Some(elements) = &given.values else { return Truth::Null };
        let Some(family) = given.type_name.strip_suffix("[]").and_then(family_of) else { return Truth::Ask };
        // Nothing is among nothing, null neither.
        if elements.is_empty() {
            return Truth::False;
        }
        let (text, of) = match operand {
            Operated::Text(text, of) => (text, of),
            Operated::Null => return Truth::Null,
            Operated::Lacking => return Truth::Lacking,
            Operated::Ask => return Truth::Ask,
        };
        let each = elements.iter().map(|element| match element {
            Some(element) => compare(Operated::Text(text, of), Relation::Equal, Operated::Text(element, family)),
            None => Truth::Null,
        });
        fold(each, Truth::True, Truth::False)
    }
}

/// One that `settles` settles it; else what is unknown stays unknown, the more so the less is known.
fn fold(parts: impl Iterator<Item = Truth>, settles: Truth, neutral: Truth) -> Truth {
    let mut all = neutral;
    for part in parts {
        if part == settles {
            return settles;
        }
        all = match (all, part) {
            (Truth::Ask, _) | (_, Truth::Ask) => Truth::Ask,
            (Truth::Lacking, _) | (_, Truth::Lacking) => Truth::Lacking,
            (Truth::Null, _) | (_, Truth::Null) => Truth::Null,
            _ => neutral,
        };
    }
    all
}

fn compare(left: Operated<'_>, relation: Relation, right: Operated<'_>) -> Truth {
    let (left, right) = match (left, right) {
        (Operated::Ask, _) | (_, Operated::Ask) => return Truth::Ask,
        (Operated::Lacking, _) | (_, Operated::Lacking) => return Truth::Lacking,
        (Operated::Null, other) | (other, Operated::Null) => {
            let both = matches!(other, Operated::Null);
            return match relation {
                Relation::Distinct => truth(!both),
                Relation::NotDistinct => truth(both),
                _ => Truth::Null,
            };
        }
        (Operated::Text(left, of), Operated::Text(right, other)) => match common(of, other) {
            Some(family) => ((left, family), right),
            None => return Truth::Ask,
        },
    };
    let ((left, family), right) = (left, right);
    let equal = |negated: bool| family.equal(left, right).map_or(Truth::Ask, |equal| truth(equal != negated));
    let ordered = |test: fn(Ordering) -> bool| match family {
        Family::Integer | Family::Uuid | Family::Bool => family.order(left, right).map_or(Truth::Ask, |order| truth(test(order))),
        // Which collation the comparison takes is not told by the column alone.
        _ => Truth::Ask,
    };
    match relation {
        Relation::Equal | Relation::NotDistinct => equal(false),
        Relation::NotEqual | Relation::Distinct => equal(true),
        Relation::Less => ordered(Ordering::is_lt),
        Relation::LessOrEqual => ordered(Ordering::is_le),
        Relation::Greater => ordered(Ordering::is_gt),
        Relation::GreaterOrEqual => ordered(Ordering::is_ge),
    }
}

/// Only like with like: PostgreSQL has other operators for anything else.
fn common(a: Family, b: Family) -> Option<Family> {
    match (a, b) {
        (Family::Text(_), Family::Text(_))
        | (Family::Uuid, Family::Uuid)
        | (Family::Integer, Family::Integer)
        | (Family::Bool, Family::Bool) => Some(a),
        _ => None,
    }
}

/// Of what PostgreSQL calls the type.
fn family_of(type_name: &str) -> Option<Family> {
    Some(match type_name {
        "text" | "character varying" => Family::Text(walcast_model::Collation { by_bytes: false, folds_ascii: false }),
        "uuid" => Family::Uuid,
        "smallint" | "integer" | "bigint" => Family::Integer,
        "boolean" => Family::Bool,
        _ => return None,
    })
}

fn truth(value: bool) -> Truth {
    if value { Truth::True } else { Truth::False }
}
