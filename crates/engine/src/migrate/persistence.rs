//! Makes the cache table logged or unlogged, as the settings say and only where it differs. Either way it is rewritten once,
//! under a lock that readers of the cache do not wait for: they compute meanwhile.

use tokio_postgres::Client;
use walcast_pg::PgError;

use super::{Advice, MigrateError, Step};

pub(super) struct Persistence {
    pub step: Option<Step>,
    pub advice: Option<Advice>,
}

const LOOK: &str = "
select coalesce((select c.relpersistence = 'p' from pg_catalog.pg_class c
                 where c.relname = 'cache_entries' and c.relnamespace = to_regnamespace('walcast')), false),
  (select string_agg(p.pubname::text, ', ' order by 1) from pg_catalog.pg_publication p
   where p.puballtables or exists (select from pg_catalog.pg_publication_namespace s
     where s.pnpubid = p.oid and s.pnnspid = to_regnamespace('walcast')))";

pub(super) async fn plan(client: &Client, logged: bool) -> Result<Persistence, MigrateError> {
    const DOING: &str = "looking at the cache table";
    let rows = client.query_typed(LOOK, &[]).await.map_err(PgError::when(DOING))?;
    let row = rows.first().ok_or(PgError::Unexpected { doing: DOING, what: "no row".into() })?;
    let (is_logged, publications): (bool, Option<String>) = (row.get(0), row.get(1));
    if is_logged == logged {
        return Ok(Persistence { step: None, advice: None });
    }
    // An unlogged table is in no publication. A logged one would be in these: each cached value would go to whoever
    // subscribes to them.
    if let Some(publications) = publications.filter(|_| logged) {
        let sentence = format!(
            "The cache table stays unlogged: publication {publications} carries every table and would carry cached values too. \
             Name its tables one by one, or set cache.l2_logged = false"
        );
        return Ok(Persistence { step: None, advice: Some(Advice { sentence, sql: None }) });
    }
    Ok(Persistence { step: Some(step(logged)), advice: None })
}

/// Where nothing is known of the database: the files make it unlogged.
pub(super) fn from_scratch(logged: bool) -> Option<Step> {
    logged.then(|| step(true))
}

fn step(logged: bool) -> Step {
    let word = if logged { "logged" } else { "unlogged" };
    Step {
        title: format!("the cache table is {word}, as cache.l2_logged says"),
        sql: format!("alter table walcast.cache_entries set {word};\n"),
        file: None,
    }
}
