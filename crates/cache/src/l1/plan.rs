//! Who gets how much of L1: a room of its own for a namespace that asks for one, and one for each policy in use.
//!
//! Called once, when the cache is made. The rooms together never have more than the cache was given.

use std::collections::HashMap;

use crate::{CacheConfig, Policy};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RoomPlan {
    /// The namespace's, else the policy's.
    pub name: String,
    pub policy: Policy,
    pub bytes: u64,
    pub entries: Option<usize>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub rooms: Vec<RoomPlan>,
    /// Which room a named namespace has. Every other has the first.
    pub of: HashMap<String, usize>,
}

/// What the shared rooms keep, whatever the namespaces with rooms of their own ask for.
const SHARED_AT_LEAST: u64 = 16;

impl Plan {
    pub(super) fn of(config: &CacheConfig) -> Plan {
        let mut named: Vec<_> = config.namespaces.iter().collect();
        named.sort_by_key(|(name, _)| *name);
        // How many namespaces share a policy's room; those that nobody named count as one. In the order of use.
        let mut sharing: Vec<(Policy, u64)> = vec![(config.unnamed.policy, 1)];
        for (_, namespace) in named.iter().filter(|(_, namespace)| namespace.l1_bytes.is_none()) {
            match sharing.iter_mut().find(|(policy, _)| *policy == namespace.policy) {
                Some((_, count)) => *count += 1,
                None => sharing.push((namespace.policy, 1)),
            }
        }
        let asked: u128 = named.iter().filter_map(|(_, namespace)| namespace.l1_bytes).map(u128::from).sum();
        let most = u128::from(config.l1_bytes - config.l1_bytes / SHARED_AT_LEAST);
        if asked > most {
            tracing::warn!(asked, most, "namespaces ask for more of L1 than there is: each gets less; raise `cache.l1_bytes`");
        }
        let own = |bytes: u64| if asked > most { (most * u128::from(bytes) / asked) as u64 } else { bytes };
        let shared = config.l1_bytes - named.iter().filter_map(|(_, namespace)| namespace.l1_bytes).map(own).sum::<u64>();
        let users: u64 = sharing.iter().map(|(_, count)| count).sum();

        let entries_of = |bytes: u64| config.l1_entries.map(|all| share(all as u64, bytes, config.l1_bytes).max(1) as usize);
        let room = |name: &str, policy, bytes| RoomPlan { name: name.to_owned(), policy, bytes, entries: entries_of(bytes) };
        let mut rooms: Vec<RoomPlan> =
            sharing.iter().map(|(policy, count)| room(policy.as_str(), *policy, share(shared, *count, users))).collect();
        let mut of = HashMap::new();
        for (name, namespace) in named {
            let index = match namespace.l1_bytes {
                Some(bytes) => {
                    rooms.push(room(name, namespace.policy, own(bytes)));
                    rooms.len() - 1
                }
                // Listed above, so it is found.
                None => sharing.iter().position(|(policy, _)| *policy == namespace.policy).unwrap_or(0),
            };
            of.insert(name.clone(), index);
        }
        Plan { rooms, of }
    }
}

/// `part` of `whole` parts of `all`, rounded down.
fn share(all: u64, part: u64, whole: u64) -> u64 {
    (u128::from(all) * u128::from(part) / u128::from(whole.max(1))) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NamespaceConfig;

    fn plan(l1_bytes: u64, namespaces: &[(&str, Policy, Option<u64>)]) -> Plan {
        let namespaces = namespaces.iter().map(|(name, policy, l1_bytes)| {
            let config = NamespaceConfig { policy: *policy, l1_bytes: *l1_bytes, ..NamespaceConfig::default() };
            ((*name).to_owned(), config)
        });
        Plan::of(&CacheConfig { l1_bytes, namespaces: namespaces.collect(), ..CacheConfig::default() })
    }

    fn bytes(plan: &Plan) -> Vec<(&str, u64)> {
        plan.rooms.iter().map(|room| (room.name.as_str(), room.bytes)).collect()
    }

    #[test]
    fn without_wishes_there_is_one_room() {
        let plan = plan(1_000, &[("a", Policy::Adaptive, None)]);
        assert_eq!(bytes(&plan), [("adaptive", 1_000)]);
        assert_eq!(plan.of["a"], 0);
    }

    #[test]
    fn an_own_room_is_taken_from_the_whole_and_the_rest_is_shared_by_policy() {
        let wishes = [("a", Policy::Lru, Some(400)), ("b", Policy::Fifo, None), ("c", Policy::Adaptive, None)];
        let plan = plan(1_000, &wishes);
        assert_eq!(bytes(&plan), [("adaptive", 400), ("fifo", 200), ("a", 400)]);
        assert_eq!(plan.rooms[2].policy, Policy::Lru);
        assert_eq!((plan.of["a"], plan.of["b"], plan.of["c"]), (2, 1, 0));
    }

    #[test]
    fn p7_rooms_that_ask_for_too_much_get_less_and_the_shared_one_keeps_some() {
        let large = plan(1_600, &[("a", Policy::Lru, Some(u64::MAX)), ("b", Policy::Lfu, Some(u64::MAX))]);
        assert!(large.rooms.iter().map(|room| room.bytes).sum::<u64>() <= 1_600, "{large:?}");
        assert!(large.rooms[0].bytes >= 100, "{large:?}");
        let small = plan(1_600, &[("a", Policy::Lru, Some(3_000)), ("b", Policy::Lfu, Some(1_000))]);
        assert_eq!(bytes(&small), [("adaptive", 100), ("a", 1_125), ("b", 375)]);
    }

    #[test]
    fn p7_a_bound_on_entries_is_shared_as_the_bytes_are() {
        let mut config = CacheConfig { l1_bytes: 1_000, l1_entries: Some(10), ..CacheConfig::default() };
        let own = NamespaceConfig { l1_bytes: Some(300), ..NamespaceConfig::default() };
        config.namespaces.insert("a".into(), own);
        let entries: Vec<_> = Plan::of(&config).rooms.iter().map(|room| room.entries).collect();
        assert_eq!(entries, [Some(7), Some(3)]);
    }
}
