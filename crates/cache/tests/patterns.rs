//! A pattern means to us what its LIKE form means to PostgreSQL: SQL that reads the cache table relies on it.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use walcast_cache::Glob;
use walcast_testkit::TestPostgres;

/// Few characters, so that patterns match; among them all that LIKE or we would read as syntax.
const ALPHABET: &[char] = &['a', 'b', '*', '?', '%', '_', '\\', 'é', '🦀', '*', 'a'];

fn text(random: &mut StdRng, longest: usize) -> String {
    let length = random.random_range(0..=longest);
    (0..length).map(|_| *ALPHABET.choose(random).unwrap()).collect()
}

#[tokio::test]
async fn a_pattern_and_its_like_form_match_the_same_keys() {
    let postgres = TestPostgres::start().await.unwrap();
    let client = postgres.connect().await.unwrap();
    let seed: u64 = rand::rng().random();
    let mut random = StdRng::seed_from_u64(seed);
    let (mut keys, mut globs) = (Vec::new(), Vec::<Glob>::new());
    while globs.len() < 50_000 {
        if let Ok(glob) = text(&mut random, 6).parse() {
            globs.push(glob);
            keys.push(text(&mut random, 7));
        }
    }
    let likes: Vec<String> = globs.iter().map(Glob::like).collect();
    let sql = "select array_agg(k like l order by n) from unnest($1::text[], $2::text[]) with ordinality as v (k, l, n)";
    let theirs: Vec<bool> = client.query_one(sql, &[&keys, &likes]).await.unwrap().get(0);
    let mut matching = 0;
    for ((glob, key), theirs) in globs.iter().zip(&keys).zip(theirs) {
        assert_eq!(glob.matches(key), theirs, "`{glob}` and `{key}`, seed {seed}");
        matching += usize::from(theirs);
    }
    assert!(matching > 2_000, "only {matching} of them match: this test shows little");
}
