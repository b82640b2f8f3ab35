//! The replication slot: found, made or given up. Called when the engine attaches; never streams.
//!
//! The slot is the log: PostgreSQL keeps what we have not acknowledged, so a restart re-reads it from there.

use tokio_postgres::{Client, types::Type};
use walcast_model::Lsn;
use walcast_pg::{PgError, quote_literal};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    /// Made just now: nothing before this is known, so a new epoch begins.
    Created { at: Lsn },
    /// Streaming continues behind this acknowledged LSN.
    Found { acknowledged: Lsn },
}

#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error(
        "slot `{slot}` is in use by PID {pid}; another `walcast serve` reads it: stop that one, or give this one another slot (`database.slot`)"
    )]
    InUse { slot: String, pid: i32 },
    #[error("slot `{slot}` belongs to {owner}; choose another name with `database.slot`, or drop it: select pg_drop_replication_slot({literal})", literal = quote_literal(.slot))]
    Foreign { slot: String, owner: String },
    #[error("slot `{slot}` cannot be made: {reason}; {hint}")]
    Refused { slot: String, reason: String, hint: &'static str },
    #[error(transparent)]
    Database(#[from] PgError),
}

const DOING: &str = "looking for the replication slot";

/// Finds the slot or makes it. A slot that lost its WAL is replaced: that begins a new epoch, with a resync for all.
pub async fn ensure(client: &Client, slot: &str) -> Result<SlotState, SlotError> {
    match find(client, slot).await? {
        Some(Found { lost: true, .. }) => {
            tracing::warn!(slot, "the slot lost its WAL (max_slot_wal_keep_size); making a new one: every subscriber resyncs");
            let sql = "select pg_drop_replication_slot($1)";
            client.query_typed(sql, &[(&slot, Type::NAME)]).await.map_err(PgError::when("dropping the lost slot"))?;
            create(client, slot).await
        }
        Some(found) => match found.active_pid {
            Some(pid) => Err(SlotError::InUse { slot: slot.to_owned(), pid }),
            None => Ok(SlotState::Found { acknowledged: found.acknowledged }),
        },
        None => create(client, slot).await,
    }
}

struct Found {
    acknowledged: Lsn,
    active_pid: Option<i32>,
    lost: bool,
}

async fn find(client: &Client, slot: &str) -> Result<Option<Found>, SlotError> {
    let sql = "select coalesce(plugin::text, 'physical replication'), coalesce(database::text, ''), current_database()::text, active_pid, \
               coalesce(confirmed_flush_lsn::text, '0/0'), coalesce(wal_status, '') = 'lost' \
               from pg_catalog.pg_replication_slots where slot_name = $1";
    let rows = client.query_typed(sql, &[(&slot, Type::NAME)]).await.map_err(PgError::when(DOING))?;
    let Some(row) = rows.first() else { return Ok(None) };
    let (plugin, database, here): (&str, &str, &str) = (row.get(0), row.get(1), row.get(2));
    if plugin != "pgoutput" || database != here {
        let owner = format!("plugin `{plugin}` in database `{database}`");
        return Err(SlotError::Foreign { slot: slot.to_owned(), owner });
    }
    let acknowledged =
        row.get::<_, &str>(4).parse().map_err(|error| PgError::Unexpected { doing: DOING, what: format!("{error}") })?;
    Ok(Some(Found { acknowledged, active_pid: row.get(3), lost: row.get(5) }))
}

async fn create(client: &Client, slot: &str) -> Result<SlotState, SlotError> {
    let sql = "select lsn::text from pg_create_logical_replication_slot($1, 'pgoutput')";
    let made = client.query_typed(sql, &[(&slot, Type::NAME)]).await.map_err(PgError::when("making the replication slot"));
    let rows = made.map_err(|error| match error {
        PgError::Refused { code, message, .. } => {
            let hint = match code.as_str() {
                "42501" => "the login role needs the REPLICATION attribute: `walcast migrate` grants it",
                "53400" => "every slot is taken: raise max_replication_slots and restart PostgreSQL",
                "55000" => "set wal_level = logical and restart PostgreSQL",
                _ => "run `walcast check`",
            };
            SlotError::Refused { slot: slot.to_owned(), reason: message, hint }
        }
        other => SlotError::Database(other),
    })?;
    let text: &str = rows.first().map(|row| row.get(0)).unwrap_or("0/0");
    let at = text.parse().map_err(|error| PgError::Unexpected { doing: DOING, what: format!("{error}") })?;
    tracing::info!(slot, %at, "replication slot made");
    Ok(SlotState::Created { at })
}
