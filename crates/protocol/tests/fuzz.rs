//! Whatever a client sends as a frame, and whoever writes into the WAL in our name: read, or refused with a reason. Never a
//! panic, never more memory than a multiple of what came; and what is answered is a frame that can be read.

use std::alloc::System;

use bytes::Bytes;
use serde_json::{Value, json};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use walcast_protocol::{
    join::Join,
    message::Message,
    phoenix::{Inbound, Vsn, end, push, reply},
};
use walcast_testkit::mutate::{Mutator, cases};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const TEXT: [&[u8]; 7] = [
    br#"["1","1","realtime:room","phx_join",{"config":{"broadcast":{"ack":false,"self":false},"presence":{"key":"","enabled":false},"postgres_changes":[{"event":"*","schema":"public","table":"todos","filter":"id=in.(1,2)","select":["id","title"]}],"private":false,"walcast":{"after":"5f3a09c1/16/B374D848/3"}},"access_token":"a.b.c"}]"#,
    br#"[null,"2","phoenix","heartbeat",{}]"#,
    br#"["1","3","realtime:room","access_token",{"access_token":"a.b.c"}]"#,
    br#"["1",4,"realtime:room","phx_leave",{},"extra"]"#,
    br#"{"topic":"realtime:room","event":"phx_join","payload":{"config":{"postgres_changes":[{"event":"INSERT","schema":"public"}]},"user_token":"t"},"ref":"1","join_ref":"1"}"#,
    br#"{"topic":"phoenix","event":"heartbeat","payload":{},"ref":null}"#,
    b"{\"topic\":\"realtime:\xc3\xa4\",\"event\":\"broadcast\",\"payload\":{\"type\":\"broadcast\",\"event\":\"x\",\"payload\":{\"n\":1.5e3}},\"ref\":7}",
];
const BINARY: [&[u8]; 4] = [
    b"\x03\x01\x01\x0e\x06\x00\x0167realtime:room1cursor{\"x\":1}",
    b"\x03\x01\x01\x0e\x06\x0d\x0067realtime:room1cursor{\"meta\":true}\xff\xfe\xfd",
    b"\x00\x01\x01\x0e\x0867realtime:room1phx_join{\"config\":{}}",
    b"\x03\x00\x00\x02\x01\x00\x00\xe9\xe5\xfc",
];
const WORDS: [&[u8]; 18] = [
    b"null",
    b"[[[[[[[[[[[[[[[[",
    b"{\"a\":",
    b"\"",
    b"\\u0000",
    b"\\ud800",
    b"1e999",
    b"-",
    b"\xff",
    b"\"config\":7",
    b"]",
    b"}",
    b"\"postgres_changes\":[null,7,{}]",
    b"phx_join",
    b"realtime:",
    b"\"private\":\"true\"",
    b",",
    b"\0",
];
const IN_THE_WAL: [&[u8]; 3] = [
    br#"{"heartbeat":{"nonce":"0011223344556677","at_ms":178730}}"#,
    br#"{"invalidate":{"tags":["patients:id=7","~key:reports:ward-3","~ns:reports","~all"],"id":"x"}}"#,
    br#"{"invalidate":{"selection":{"namespace":"reports","pattern":"ward-*","all_of":["a","b"],"any_of":["c"],"soft":true}}}"#,
];

/// Parsed, within bounds.
fn bounded<T>(input: &[u8], parse: impl FnOnce() -> T) -> T {
    let region = Region::new(ALLOCATOR);
    let parsed = parse();
    let allocated = region.change().bytes_allocated;
    assert!(
        allocated <= (64 << 10) + 512 * input.len(),
        "{allocated} bytes for {}: {}",
        input.len(),
        String::from_utf8_lossy(input)
    );
    parsed
}

/// What the server does with any frame, whoever sent it.
fn answered(inbound: &Inbound) {
    let join = Join::parse(&inbound.payload);
    for binding in &join.bindings {
        assert!((1..=0x7FFF_FFFF).contains(&binding.id()), "an id that clients cannot keep");
    }
    for vsn in [Vsn::V1, Vsn::V2] {
        readable(vsn, &reply(vsn, inbound, "ok", &json!({ "postgres_changes": [] })));
        readable(vsn, &push(vsn, &inbound.topic, &inbound.event, inbound.payload.to_string().as_bytes()));
        readable(vsn, &end(vsn, inbound.join_ref.as_deref(), &inbound.topic, "phx_error", &inbound.payload));
    }
}

fn readable(vsn: Vsn, frame: &Bytes) {
    let value: Value =
        serde_json::from_slice(frame).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(frame)));
    assert!(if vsn == Vsn::V2 { value.as_array().is_some_and(|parts| parts.len() == 5) } else { value.is_object() });
}

/// Both sides must be met, or nothing is tested.
fn run<T, E: std::fmt::Display>(
    what: &str,
    count: u64,
    mut mutator: Mutator<'_>,
    mut parse: impl FnMut(&[u8]) -> Result<T, E>,
    mut then: impl FnMut(T),
) {
    let (mut read, mut refused) = (0_u64, 0_u64);
    for n in 0..cases(count) {
        let bytes = mutator.injured();
        match bounded(&bytes, || parse(&bytes)) {
            Ok(parsed) => {
                read += 1;
                // Answering costs more than reading: some are enough.
                if n % 4 == 0 {
                    then(parsed);
                }
            }
            Err(error) => {
                refused += 1;
                let text = error.to_string();
                assert!(!text.is_empty() && text.len() < 1_000, "{what}: {text}");
            }
        }
    }
    println!("{what}: {read} read, {refused} refused");
    assert!(read > count / 1_000 && refused > count / 1_000, "{what}: {read} read, {refused} refused");
}

#[test]
fn p7_no_frame_makes_the_server_panic_or_eat_memory() {
    let text = |vsn| {
        move |bytes: &[u8]| {
            // As it comes to us: what is not UTF-8 never gets past the socket.
            Inbound::parse_text(vsn, &String::from_utf8_lossy(bytes))
        }
    };
    run("text, vsn 1", 200_000, Mutator::new(&TEXT, &WORDS), text(Vsn::V1), |frame| answered(&frame));
    run("text, vsn 2", 200_000, Mutator::new(&TEXT, &WORDS), text(Vsn::V2), |frame| answered(&frame));
    run("binary", 200_000, Mutator::new(&BINARY, &WORDS), Inbound::parse_binary, |frame| answered(&frame));
    let joined = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).map(|value| Join::parse(&value["payload"]));
    run("joins", 200_000, Mutator::new(&TEXT, &WORDS), joined, drop);
    let in_the_wal = |bytes: &[u8]| Message::parse(bytes).map_err(|unreadable| format!("{unreadable:?}"));
    run("messages in the WAL", 200_000, Mutator::new(&IN_THE_WAL, &WORDS), in_the_wal, |message| {
        let again = Message::parse(message.text().as_bytes()).expect("what we write we can read");
        assert_eq!(again.text(), message.text());
    });
}
