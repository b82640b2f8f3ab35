//! Who asked for this change: found by table and by hashed equality, so that a change costs its matches.
//!
//! Called by the pipeline for every change, and by subscriptions as they come and go.

use std::collections::HashMap;

use walcast_model::{Cell, Change, Operation, Row, Table};

use crate::binding::{Binding, Equal, canonical};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubscriptionId(pub u64);

#[derive(Debug, Default)]
pub struct Index {
    /// By (schema, table), with None for "every".
    places: HashMap<(Option<String>, Option<String>), Place>,
    bindings: HashMap<SubscriptionId, Binding>,
}

#[derive(Debug, Default)]
struct Place {
    unfiltered: Vec<SubscriptionId>,
    /// Filed under the first condition: column, then value.
    equal: HashMap<String, HashMap<String, Vec<SubscriptionId>>>,
}

impl Index {
    /// A filter's value must be PostgreSQL's own text form of the column's type.
    pub fn subscribe(&mut self, id: SubscriptionId, binding: Binding) {
        let place = self.places.entry((binding.schema.clone(), binding.table.clone())).or_default();
        match binding.filters.first() {
            Some(first) => {
                place.equal.entry(first.column.clone()).or_default().entry(file_under(&first.value)).or_default().push(id)
            }
            None => place.unfiltered.push(id),
        }
        self.bindings.insert(id, binding);
    }

    pub fn unsubscribe(&mut self, id: SubscriptionId) {
        let Some(binding) = self.bindings.remove(&id) else { return };
        let key = (binding.schema, binding.table);
        let Some(place) = self.places.get_mut(&key) else { return };
        match binding.filters.first() {
            Some(first) => {
                let Some(values) = place.equal.get_mut(&first.column) else { return };
                if let Some(ids) = values.get_mut(&file_under(&first.value)) {
                    ids.retain(|other| *other != id);
                    if ids.is_empty() {
                        values.remove(&file_under(&first.value));
                    }
                }
                if values.is_empty() {
                    place.equal.remove(&first.column);
                }
            }
            None => place.unfiltered.retain(|other| *other != id),
        }
        if place.unfiltered.is_empty() && place.equal.is_empty() {
            self.places.remove(&key);
        }
    }

    pub fn len(&self) -> usize {
        self.bindings.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bindings.is_empty()
    }

    /// Appends every subscription that wants this change. Filters look at the new row, for DELETE at the old one.
    pub fn subscriptions(&self, change: &Change, out: &mut Vec<SubscriptionId>) {
        let row = match change.operation {
            Operation::Insert | Operation::Update => change.new.as_ref(),
            Operation::Delete => change.old.as_ref(),
            Operation::Truncate => return,
        };
        for place in self.places_of(&change.table) {
            out.extend(place.unfiltered.iter().filter(|id| self.wants(**id, change, row)));
            for (column, values) in &place.equal {
                let Some(found) = value_of(&change.table, row, column).and_then(|value| values.get(&file_under(value))) else {
                    continue;
                };
                out.extend(found.iter().filter(|id| self.wants(**id, change, row)));
            }
        }
    }

    /// Every subscription to the table, whatever its filter: who must hear that something of it was lost.
    pub fn of_table(&self, table: &Table, out: &mut Vec<SubscriptionId>) {
        for place in self.places_of(table) {
            out.extend(place.unfiltered.iter());
            out.extend(place.equal.values().flat_map(HashMap::values).flatten());
        }
    }

    fn places_of(&self, table: &Table) -> impl Iterator<Item = &Place> {
        let schema = Some(table.name.schema().to_owned());
        let name = Some(table.name.table().to_owned());
        let keys = [(schema.clone(), name.clone()), (schema, None), (None, name), (None, None)];
        keys.into_iter().filter_map(|key| self.places.get(&key))
    }

    fn wants(&self, id: SubscriptionId, change: &Change, row: Option<&Row>) -> bool {
        self.bindings.get(&id).is_some_and(|binding| {
            binding.events.has(change.operation) && binding.filters.iter().all(|filter| holds(&change.table, row, filter))
        })
    }
}

/// Numbers are filed under their shortest form, so that `1.0` finds `1.00`; the exact test follows per column.
fn file_under(value: &str) -> String {
    let plain = value.trim_end_matches(' ');
    if plain.contains('.') && plain.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'-')) {
        return plain.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    if plain == "-0" { "0".to_owned() } else { plain.to_owned() }
}

fn value_of<'a>(table: &Table, row: Option<&'a Row>, column: &str) -> Option<&'a str> {
    let (index, _) = table.column(column)?;
    match row?.cell(index) {
        cell @ Cell::Value(_) => cell.text(),
        // Null equals nothing; a value that is not in the image is not guessed.
        Cell::Null | Cell::Unchanged | Cell::Absent => None,
    }
}

fn holds(table: &Table, row: Option<&Row>, filter: &Equal) -> bool {
    let Some((_, column)) = table.column(&filter.column) else { return false };
    value_of(table, row, &filter.column).is_some_and(|value| canonical(column, value) == canonical(column, &filter.value))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use walcast_model::{Column, ReplicaIdentity, TableId, TableName, ValueKind};

    use super::*;

    fn table(name: &str) -> Arc<Table> {
        let column = |name: &str, type_name: &str, kind| Column {
            name: name.into(),
            type_oid: 0,
            type_name: type_name.into(),
            kind,
            key: name == "id",
            tagged: true,
        };
        Arc::new(Table {
            id: TableId(1),
            name: TableName::new("public", name),
            identity: ReplicaIdentity::Default,
            columns: vec![column("id", "int8", ValueKind::Number), column("price", "numeric", ValueKind::Number)],
        })
    }

    fn change(operation: Operation, id: &str, price: &str) -> Change {
        let row = Some(Row(vec![Cell::Value(id.to_owned().into()), Cell::Value(price.to_owned().into())]));
        let (new, old) = if operation == Operation::Delete { (None, row) } else { (row, None) };
        Change { table: table("orders"), operation, new, old }
    }

    fn hears(binding: (&str, Option<&str>, Option<&str>, Option<&str>), change: &Change) -> bool {
        let mut index = Index::default();
        let binding = Binding::parse(binding.0, binding.1, binding.2, binding.3).unwrap();
        index.subscribe(SubscriptionId(1), binding);
        let mut found = Vec::new();
        index.subscriptions(change, &mut found);
        index.unsubscribe(SubscriptionId(1));
        assert!(index.is_empty() && index.places.is_empty(), "nothing is left behind");
        !found.is_empty()
    }

    #[test]
    fn order_42_reaches_its_subscriber_and_not_the_one_of_order_7() {
        let insert = change(Operation::Insert, "42", "1.50");
        assert!(hears(("*", None, Some("orders"), Some("id=eq.42")), &insert));
        assert!(!hears(("*", None, Some("orders"), Some("id=eq.7")), &insert));
        assert!(hears(("INSERT", Some("public"), None, None), &insert));
        assert!(!hears(("UPDATE", Some("public"), None, None), &insert));
        assert!(hears(("*", Some("*"), Some("orders"), None), &insert));
        assert!(!hears(("*", None, Some("patients"), None), &insert));
        assert!(hears(("DELETE", None, Some("orders"), Some("id=eq.42")), &change(Operation::Delete, "42", "1")));
        assert!(!hears(("*", None, Some("orders"), None), &change(Operation::Truncate, "42", "1")));
    }

    #[test]
    fn numbers_are_equal_as_numbers_and_all_conditions_must_hold() {
        let insert = change(Operation::Insert, "42", "1.50");
        assert!(hears(("*", None, Some("orders"), Some("price=eq.1.5")), &insert));
        assert!(hears(("*", None, Some("orders"), Some("price=eq.1.500,id=eq.42")), &insert));
        assert!(!hears(("*", None, Some("orders"), Some("price=eq.1.5,id=eq.7")), &insert));
        assert!(!hears(("*", None, Some("orders"), Some("colour=eq.red")), &insert));
    }
}
