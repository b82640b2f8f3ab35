//! SQL finds rows and clock slots by itself: what PostgreSQL hashes is what we hash.

use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use tokio_postgres::types::Type;
use walcast_model::{CacheKey, Tag};
use walcast_testkit::TestPostgres;

fn texts() -> Vec<String> {
    // Every length of the last block, with bytes that differ and with the highest ones.
    let mut texts: Vec<String> = (0..64).map(|len| (0..len).map(|at| char::from(b'!' + at)).collect()).collect();
    texts.extend((1..64).map(|len| "\u{10ffff}".repeat(len)));
    let mut runner = TestRunner::deterministic();
    let any = proptest::collection::vec(proptest::char::any(), 0..120);
    let random =
        (0..500).filter_map(|_| any.new_tree(&mut runner).ok()).map(|tree| tree.current().into_iter().collect::<String>());
    texts.extend(random.map(|text| text.replace('\0', "")));
    texts
}

#[tokio::test]
async fn a_tag_and_a_key_have_the_same_hash_in_sql() -> Result<(), Box<dyn std::error::Error>> {
    let postgres = TestPostgres::start().await?;
    let client = postgres.connect().await?;
    let texts = texts();
    let sql = "select hashtextextended(t collate \"C\", 0), int8send(hashtextextended('n/' || t collate \"C\", 1)) || int8send(hashtextextended('n/' || t collate \"C\", 2)) \
               from unnest($1::text[]) with ordinality x(t, i) order by i";
    let rows = client.query_typed(sql, &[(&texts, Type::TEXT_ARRAY)]).await?;
    assert_eq!(rows.len(), texts.len());
    let mut keys = 0;
    for (row, text) in rows.iter().zip(&texts) {
        assert_eq!(row.get::<_, i64>(0) as u64, Tag::stored(text).hash().0, "{text:?}");
        if let Ok(key) = CacheKey::new("n", text) {
            keys += 1;
            assert_eq!(row.get::<_, &[u8]>(1), key.digest(), "{text:?}");
        }
    }
    assert!(keys > 100, "{keys} of the texts are keys");
    Ok(())
}
