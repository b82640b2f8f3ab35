//! Who asked for this change: found by table and by hashed equality, so that a change costs its matches.
//!
//! Called by the pipeline for every change, and by subscriptions as they come and go. A subscription whose conditions hold
//! an `eq` or an `in` is filed under those values; the others stand behind their table and are tried one by one.

use std::collections::HashMap;

use indexmap::{IndexMap, IndexSet};
use walcast_model::{Cell, Change, Family, Table};

use crate::{
    binding::{Binding, EventMask, Filter, Wants, filtered_cell},
    filter::{Comparison, Test},
};

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
    unfiltered: IndexMap<SubscriptionId, EventMask>,
    equal: HashMap<Drawer, HashMap<String, IndexSet<SubscriptionId>>>,
    /// Ranges, patterns, negations, and what was never checked.
    others: IndexSet<SubscriptionId>,
}

/// A column, as it was when the subscription was checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Drawer {
    column: String,
    family: Family,
    type_oid: u32,
}

impl Index {
    pub fn subscribe(&mut self, id: SubscriptionId, binding: Binding) {
        let place = self.places.entry((binding.schema.clone(), binding.table.clone())).or_default();
        match filed(&binding) {
            _ if binding.filters.is_empty() => {
                place.unfiltered.insert(id, binding.events);
            }
            Some((drawer, keys)) => {
                let drawer = place.equal.entry(drawer).or_default();
                for key in keys {
                    drawer.entry(key).or_default().insert(id);
                }
            }
            None => {
                place.others.insert(id);
            }
        }
        self.bindings.insert(id, binding);
    }

    pub fn unsubscribe(&mut self, id: SubscriptionId) {
        let Some(binding) = self.bindings.remove(&id) else { return };
        let filed = filed(&binding);
        let key = (binding.schema, binding.table);
        let Some(place) = self.places.get_mut(&key) else { return };
        match filed {
            _ if binding.filters.is_empty() => {
                place.unfiltered.swap_remove(&id);
            }
            Some((drawer, keys)) => {
                let Some(values) = place.equal.get_mut(&drawer) else { return };
                for key in keys {
                    if let Some(ids) = values.get_mut(&key) {
                        ids.swap_remove(&id);
                        if ids.is_empty() {
                            values.remove(&key);
                        }
                    }
                }
                if values.is_empty() {
                    place.equal.remove(&drawer);
                }
            }
            None => {
                place.others.swap_remove(&id);
            }
        }
        if place.unfiltered.is_empty() && place.equal.is_empty() && place.others.is_empty() {
            self.places.remove(&key);
        }
    }

    pub fn len(&self) -> usize {
        self.bindings.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bindings.is_empty()
    }

    /// Appends every subscription that wants this change, or may want it.
    pub fn subscriptions(&self, change: &Change, out: &mut Vec<(SubscriptionId, Wants)>) {
        for place in self.places_of(&change.table) {
            let unfiltered = place.unfiltered.iter().filter(|(_, events)| events.has(change.operation));
            out.extend(unfiltered.map(|(id, _)| (*id, Wants::Yes)));
            out.extend(place.others.iter().filter_map(|id| self.wants(*id, change)));
            for (drawer, values) in &place.equal {
                let key = match filtered_cell(change, &drawer.column) {
                    Some((Cell::Null | Cell::Absent, _)) => continue,
                    Some((cell @ Cell::Value(_), type_oid)) if type_oid == drawer.type_oid => {
                        cell.text().and_then(|text| drawer.family.key(text))
                    }
                    Some((Cell::Value(_) | Cell::Unchanged, _)) | None => None,
                };
                match key {
                    Some(key) => {
                        let found = values.get(key.as_ref());
                        out.extend(found.into_iter().flatten().filter_map(|id| self.wants(*id, change)));
                    }
                    // Nothing to look up: whoever filters on the column may be meant. One with a list stands under each value.
                    None => {
                        let mut everyone: Vec<_> = values.values().flatten().copied().collect();
                        everyone.sort_unstable();
                        everyone.dedup();
                        out.extend(everyone.into_iter().filter_map(|id| self.wants(id, change)));
                    }
                }
            }
        }
    }

    /// Every subscription to the table, whatever its filter: who must hear that something of it was lost.
    pub fn of_table(&self, table: &Table, out: &mut Vec<SubscriptionId>) {
        for place in self.places_of(table) {
            out.extend(place.unfiltered.keys());
            out.extend(&place.others);
            out.extend(place.equal.values().flat_map(HashMap::values).flatten());
        }
    }

    fn places_of(&self, table: &Table) -> impl Iterator<Item = &Place> {
        let schema = Some(table.name.schema().to_owned());
        let name = Some(table.name.table().to_owned());
        let keys = [(schema.clone(), name.clone()), (schema, None), (None, name), (None, None)];
        keys.into_iter().filter_map(|key| self.places.get(&key))
    }

    fn wants(&self, id: SubscriptionId, change: &Change) -> Option<(SubscriptionId, Wants)> {
        self.bindings.get(&id)?.wants(change).map(|wants| (id, wants))
    }
}

/// The first condition that names its values, and their keys.
fn filed(binding: &Binding) -> Option<(Drawer, Vec<String>)> {
    binding.filters.iter().find_map(|filter| {
        let Filter { condition, family, type_oid } = filter;
        let values = match &condition.test {
            _ if condition.negated => return None,
            Test::Compare(Comparison::Equal, value) => std::slice::from_ref(value),
            Test::In(values) => values.as_slice(),
            _ => return None,
        };
        let keys: Option<Vec<String>> = values.iter().map(|value| family.key(value).map(|key| key.into_owned())).collect();
        Some((Drawer { column: condition.column.clone(), family: *family, type_oid: (*type_oid)? }, keys?))
    })
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
