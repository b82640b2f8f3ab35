//! Are all files sound on this database? They parse already; here PostgreSQL plans each as every role that may run it.
//!
//! Called at start, at each reload, and by `walcast check`. Plans that are made stay, so the first caller finds them.

use futures_util::{StreamExt, stream};
use walcast_pg::PgError;

use crate::{
    error::QueryError,
    file::{NamedQuery, QueryFileError},
    queries::Queries,
};

/// Half of the smallest pool.
const AT_ONCE: usize = 2;

/// Everything that is wrong, by file; or why nothing could be looked at. `roles` are those that tokens may name.
pub async fn check(queries: &Queries, roles: &[String]) -> Result<Vec<QueryFileError>, PgError> {
    let looked: Vec<_> = stream::iter(queries.all().cloned().collect::<Vec<_>>())
        .map(|query| async move { one(queries, &query, roles).await })
        .buffered(AT_ONCE)
        .collect()
        .await;
    let mut wrong = Vec::new();
    for found in looked {
        wrong.extend(found?);
    }
    Ok(wrong)
}

async fn one(queries: &Queries, query: &NamedQuery, roles: &[String]) -> Result<Option<QueryFileError>, PgError> {
    let wrong = |line: usize, what: String, hint: String| QueryFileError { file: query.file.clone(), line, what, hint };
    if let Some(stranger) = query.roles.iter().flatten().find(|role| !roles.contains(role)) {
        let hint = format!("no token may name it: add it to auth.allowed_roles ({}), or take it off the list", roles.join(", "));
        return Ok(Some(wrong(1, format!("`{stranger}` is in its roles"), hint)));
    }
    let mut denied = None;
    let mut allowed = false;
    for role in query.roles.as_deref().unwrap_or(roles) {
        match queries.plan(&query.name, role).await {
            Ok(_) => allowed = true,
            Err(error @ QueryError::Denied { .. }) => {
                denied.get_or_insert_with(|| wrong(query.first_line, format!("role `{role}`: {error}"), error.hint()));
            }
            Err(QueryError::Database(error)) => return Err(error),
            Err(error) => {
                let line = match &error {
                    QueryError::Refused { line: Some(line), .. } => *line,
                    QueryError::NoTotalOrder { .. } => 1,
                    _ => query.first_line,
                };
                return Ok(Some(wrong(line, error.to_string(), error.hint())));
            }
        }
    }
    // A list of roles says that each of them may; without one, some may read the tables and others not.
    let each_must = query.roles.is_some();
    Ok(denied.filter(|_| each_must || !allowed))
}
