//! Values that only PostgreSQL's own `to_jsonb` knows: composite types, and types with a cast to json.
//!
//! Read back in one statement per type and batch, before the frames are encoded. Never guessed: a value that cannot
//! be read back is left out, and said in the log.

use std::{collections::HashMap, time::Duration};

use tokio_postgres::types::Type;
use walcast_model::{Cell, Change, Claims, Lsn, Row, ValueKind};
use walcast_pg::{Envelope, PgError};

use crate::{
    Core,
    visibility::{Candidate, Verdict},
};

/// Changes whose rows hold JSON where the stream had a text that says nothing by itself.
pub type ReadBack = HashMap<(Lsn, u32), Change>;

const DOING: &str = "reading values back";
const TIMEOUT: Duration = Duration::from_secs(5);

pub async fn read_back(core: &Core, candidates: &[Candidate<'_>], verdicts: &[Verdict]) -> ReadBack {
    let mut changes = ReadBack::new();
    let mut claims = None;
    for (candidate, verdict) in candidates.iter().zip(verdicts) {
        let opaque = candidate.change.table.columns.iter().any(|column| column.kind == ValueKind::ReadBack);
        if opaque && matches!(verdict, Verdict::Show { .. }) {
            // Anyone who may see the row may read its types.
            claims.get_or_insert_with(|| candidate.audience.claims.clone());
            changes.entry((candidate.commit.commit.lsn, candidate.index)).or_insert_with(|| candidate.change.clone());
        }
    }
    let Some(claims) = claims else { return changes };
    let mut texts: HashMap<u32, Vec<String>> = HashMap::new();
    each_opaque(&mut changes, |type_oid, text| {
        let texts = texts.entry(type_oid).or_default();
        if !texts.contains(text) {
            texts.push(text.clone());
        }
        None
    });
    let mut known: HashMap<(u32, String), String> = HashMap::new();
    for (type_oid, texts) in texts {
        match ask(core, &claims, type_oid, &texts).await {
            Ok(answers) => known.extend(texts.into_iter().zip(answers).map(|(text, json)| ((type_oid, text), json))),
            // By its code: PostgreSQL's words may hold the values.
            Err(error) => tracing::warn!(
                type_oid,
                code = error.sqlstate().unwrap_or("none"),
                "values of this type cannot be read back: left out"
            ),
        }
    }
    each_opaque(&mut changes, |type_oid, text| {
        let json = known.get(&(type_oid, text.clone()));
        Some(json.map_or(Cell::Absent, |json| Cell::Value(json.clone().into())))
    });
    changes
}

/// Visits each opaque value; what `visit` returns takes its place.
fn each_opaque(changes: &mut ReadBack, mut visit: impl FnMut(u32, &String) -> Option<Cell>) {
    for change in changes.values_mut() {
        let opaque = change.table.columns.iter().enumerate().filter(|(_, column)| column.kind == ValueKind::ReadBack);
        let opaque: Vec<(usize, u32)> = opaque.map(|(index, column)| (index, column.type_oid)).collect();
        for Row(cells) in change.new.iter_mut().chain(change.old.iter_mut()) {
            for (index, type_oid) in &opaque {
                let Some(cell) = cells.get_mut(*index) else { continue };
                let Some(text) = cell.text().map(str::to_owned) else { continue };
                if let Some(instead) = visit(*type_oid, &text) {
                    *cell = instead;
                }
            }
        }
    }
}

async fn ask(core: &Core, claims: &Claims, type_oid: u32, texts: &[String]) -> Result<Vec<String>, PgError> {
    let unexpected = |what: &str| PgError::Unexpected { doing: DOING, what: what.to_owned() };
    let mut scope = Envelope::new(claims, TIMEOUT).setting("search_path", "").open(&core.pool, DOING).await?;
    let oid = i64::from(type_oid);
    // format_type quotes the name and, with an empty path, says its schema.
    let named = "select format_type($1::int8::oid, null)";
    let rows = scope.client().query_typed(named, &[(&oid, Type::INT8)]).await.map_err(PgError::when(DOING))?;
    let name: String = rows.first().and_then(|row| row.get(0)).ok_or_else(|| unexpected("the type is gone"))?;
    let sql = format!("select to_jsonb(v::{name})::text from unnest($1::text[]) with ordinality as x(v, n) order by n");
    let rows = scope.client().query_typed(&sql, &[(&texts, Type::TEXT_ARRAY)]).await.map_err(PgError::when(DOING))?;
    scope.end(DOING).await?;
    if rows.len() != texts.len() {
        return Err(unexpected("another number of answers"));
    }
    Ok(rows.iter().map(|row| row.get::<_, Option<String>>(0).unwrap_or_else(|| "null".into())).collect())
}
