//! SQL judges as we do: the same verdicts over the same clock, the same companions of the same tags.

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio_postgres::{Client, types::Type};
use walcast_engine::{
    migrate::{MigrateOptions, migrate},
    model::{CacheKey, Fence, Floor, Lsn, Snapshot, Stamp, Tag, TagClock, TagHash, Xid},
};
use walcast_testkit::TestPostgres;

const SLOTS: usize = 97;
const TAGS: [&str; 9] =
    ["patients", "patients:id=7", "patients:id=8", "a.b:c%3A=d=e", "product:7", "a:b:c", "::", ":=", "no colon = here"];

async fn migrated() -> anyhow::Result<(TestPostgres, Client)> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres.url(), &MigrateOptions::default()).await?;
    let client = postgres.connect().await?;
    Ok((postgres, client))
}

#[tokio::test]
async fn a_tag_has_the_same_companion_in_sql() -> anyhow::Result<()> {
    let (_postgres, client) = migrated().await?;
    for text in TAGS.into_iter().chain(["t:a=*", "product:*", "~ns:n", "~key:n:k:7", "é:ü=ö", ""]) {
        let row = client.query_typed("select walcast.tag_companion($1)", &[(&text, Type::TEXT)]).await?;
        let companion: Option<String> = row[0].get(0);
        let ours = Tag::stored(text).companion().map(|tag| tag.as_str().to_owned());
        // A companion has none of its own: that SQL names it again changes nothing.
        assert_eq!(companion.filter(|companion| companion != text), ours, "{text}");
    }
    Ok(())
}

/// Everything that an entry with these tags falls with.
fn hashes(key: &CacheKey, tags: &[Tag]) -> Vec<TagHash> {
    let own = [Tag::everything(), Tag::namespace(key.namespace()), Tag::key(key)];
    let companions: Vec<Tag> = tags.iter().filter_map(Tag::companion).collect();
    own.iter().chain(tags).chain(&companions).map(Tag::hash).collect()
}

#[tokio::test]
async fn p5_sql_admits_what_the_clock_admits_and_nothing_else() -> anyhow::Result<()> {
    let (_postgres, client) = migrated().await?;
    let mut random = StdRng::seed_from_u64(7);
    let key = CacheKey::new("n", "k:1").unwrap();
    let (mut yes, mut no) = (0, 0);
    for _ in 0..12 {
        let clock = TagClock::new(SLOTS, Floor(1));
        for _ in 0..random.random_range(0..40) {
            let tag = match random.random_range(0..6) {
                0 => Tag::everything(),
                1 => Tag::key(&key),
                2 => Tag::stored(["patients:id=*", "product:*", "a:*", "a.b:c%3A=*"][random.random_range(0..4)]),
                _ => Tag::stored(TAGS[random.random_range(0..TAGS.len())]),
            };
            let lsn = Lsn(random.random_range(100..160));
            let seldom = random.random_range(0..20) == 0;
            let stamp = if seldom { Stamp::unseen(lsn) } else { Stamp { lsn, xid: Xid(random.random_range(10..40)) } };
            clock.raise(tag.hash(), stamp);
        }
        client.batch_execute("delete from walcast.clock").await?;
        for image in clock.changed_since(Lsn::ZERO) {
            let stamps: Vec<u8> =
                image.stamps.iter().flat_map(|stamp| [stamp.lsn.0.to_be_bytes(), stamp.xid.0.to_be_bytes()]).flatten().collect();
            let (index, dropped) = (image.index as i32, image.dropped.to_string());
            let sql = "insert into walcast.clock values ($1, $2::text::pg_lsn, $3)";
            client.query_typed(sql, &[(&index, Type::INT4), (&dropped, Type::TEXT), (&stamps, Type::BYTEA)]).await?;
        }
        for _ in 0..60 {
            let snapshot = match random.random_range(0..8) {
                0 => Snapshot::blind(),
                _ => {
                    let (xmin, xmax) = (random.random_range(8..30), random.random_range(30..45));
                    let running = (xmin..xmax).filter(|_| random.random_range(0..6) == 0).map(Xid).collect();
                    Snapshot::new(Xid(xmin), Xid(xmax), running)
                }
            };
            let fence = Fence { snapshot, settled: Lsn(random.random_range(90..165)), floor: Floor(1) };
            let tags: Vec<Tag> = TAGS.iter().filter(|_| random.random_range(0..4) == 0).map(|text| Tag::stored(text)).collect();
            let texts: Vec<&str> = tags.iter().map(Tag::as_str).collect();
            let ours = clock.admits(&fence, &hashes(&key, &tags));
            let (settled, seen) = (fence.settled.to_string(), fence.snapshot.to_string());
            let sql = format!("select walcast.clock_admits('n', 'k:1', $1, $2::text::pg_lsn, $3, {SLOTS})");
            let rows =
                client.query_typed(&sql, &[(&texts, Type::TEXT_ARRAY), (&settled, Type::TEXT), (&seen, Type::TEXT)]).await?;
            assert_eq!(rows[0].get::<_, bool>(0), ours, "{texts:?} at {fence:?}");
            if ours { yes += 1 } else { no += 1 }
        }
    }
    assert!(yes > 100 && no > 100, "{yes} admitted, {no} not: one of them proves nothing");
    Ok(())
}
