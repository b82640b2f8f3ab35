use std::net::Ipv4Addr;

use serde_json::json;
use walcast_hub::{OutboxLimits, OutboxReader, outbox};

use super::*;
use crate::Asked;

fn claims(subject: &str, tenant: Option<&str>) -> Claims {
    let mut map = json!({ "role": "authenticated", "sub": subject, "exp": 4_000_000_000_u64 });
    if let Some(tenant) = tenant {
        map["app_metadata"] = json!({ "tenant": tenant });
    }
    Claims::verified(map.as_object().unwrap().clone()).unwrap()
}

fn connect(registry: &Arc<Registry>, component: &str, subject: &str) -> (ConnectionHandle, OutboxReader) {
    let (outbox, reader) = outbox(OutboxLimits { bytes: 1_000, frames: 100 });
    let new = NewConnection {
        kind: Kind::WebSocketV1,
        app: Some("ward"),
        component: Some(component),
        claims: &claims(subject, Some("north")),
        peer: Ipv4Addr::LOCALHOST.into(),
        outbox,
    };
    (registry.connect(new), reader)
}

fn list(connection: &ConnectionHandle, topic: &str, filter: Option<&str>) -> Listing {
    let asked = filter.map(|filter| Asked {
        event: "*".into(),
        schema: Some("public".into()),
        table: Some("patients".into()),
        filter: Some(filter.into()),
        select: None,
        client_id: 1,
    });
    connection.list(topic.into(), None, &claims("7", None), &Vec::from_iter(asked))
}

#[test]
fn p9_what_a_handle_entered_is_gone_when_the_handle_is_dropped() {
    let registry = Registry::new("app_metadata.tenant", Arc::default(), Arc::new(Traces::new(false)));
    let (connection, _reader) = connect(&registry, "board", "7");
    let first = list(&connection, "realtime:one", Some("id=eq.1"));
    let second = list(&connection, "realtime:two", None);
    assert_eq!((registry.connections(), registry.subscriptions()), (1, 2));
    assert_eq!(connection.identity.tenant.as_deref(), Some("north"));
    assert_eq!(connection.listed()[0].bindings, first.bindings);
    drop(first);
    assert_eq!((registry.connections(), registry.subscriptions()), (1, 1));
    let id = connection.id;
    drop(connection);
    assert_eq!((registry.connections(), registry.subscriptions()), (0, 0));
    assert!(registry.find(id).is_none());
    // Late, as where a task still holds it: counted once.
    drop(second);
    assert_eq!(registry.subscriptions(), 0);
}

#[test]
fn p9_an_ended_connection_lists_nothing_more() {
    let registry = Registry::new("tenant", Arc::default(), Arc::new(Traces::new(false)));
    let (connection, mut reader) = connect(&registry, "board", "7");
    let _topic = list(&connection, "realtime:one", None);
    assert!(registry.end(connection.id, "ended by an operator"));
    assert!(!registry.end(connection.id, "ended by an operator"), "it has gone");
    let _late = list(&connection, "realtime:late", None);
    assert_eq!((registry.connections(), registry.subscriptions()), (0, 0));
    let mut frames = Vec::new();
    let told = futures_util::FutureExt::now_or_never(reader.take(&mut frames));
    assert_eq!(told, Some(Err(CloseReason::Ended("ended by an operator".into()))));
}

#[test]
fn p9_who_is_silent_for_five_minutes_is_taken_out() {
    let registry = Registry::new("tenant", Arc::default(), Arc::new(Traces::new(false)));
    let (silent, _reader) = connect(&registry, "board", "7");
    let (heard, _other) = connect(&registry, "board", "8");
    let long_ago = registry.now_ms();
    // As it looks five minutes later.
    assert_eq!(registry.sweep_at(long_ago + 299_000), 0);
    heard.entry().hear(long_ago + 299_000);
    assert_eq!(registry.sweep_at(long_ago + 301_000), 1);
    assert!(registry.find(silent.id).is_none() && registry.find(heard.id).is_some());
}

#[test]
fn a_round_trip_is_smoothed() {
    let registry = Registry::new("tenant", Arc::default(), Arc::new(Traces::new(false)));
    let (connection, _reader) = connect(&registry, "board", "7");
    assert_eq!(connection.round_trip(), None);
    connection.entry().pong(Duration::from_millis(8));
    connection.entry().pong(Duration::from_millis(16));
    assert_eq!(connection.round_trip(), Some(Duration::from_millis(9)));
}

#[test]
fn p9_a_storm_of_threads_leaves_nothing_behind() {
    let registry = Registry::new("tenant", Arc::default(), Arc::new(Traces::new(false)));
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let registry = &registry;
            scope.spawn(move || {
                for n in 0..500 {
                    let (connection, _reader) = connect(registry, &format!("c{}", n % 7), &thread.to_string());
                    let topics: Vec<_> = (0..5).map(|n| list(&connection, &format!("realtime:{n}"), None)).collect();
                    match n % 3 {
                        0 => drop(topics),
                        1 => drop(connection),
                        _ => drop(registry.end(connection.id, "storm")),
                    }
                }
            });
        }
    });
    assert_eq!((registry.connections(), registry.subscriptions()), (0, 0));
    registry.each(|_| panic!("nothing is listed"));
}

#[test]
fn p7_an_entry_costs_little() {
    // What 20,000 idle connections with a topic each cost here, strings and map aside: some 9 MB.
    assert!(size_of::<Connection>() <= 160, "{}", size_of::<Connection>());
    assert!(size_of::<Listed>() <= 160, "{}", size_of::<Listed>());
}
