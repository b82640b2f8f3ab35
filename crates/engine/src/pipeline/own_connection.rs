//! The one connection of a task of ours, and never a second: what was given up in the middle must end before the next
//! statement goes out.
//!
//! Used by the keeper and by the heartbeat. A backend that waits for a lock does not notice that nobody waits for its answer
//! any more; whoever drops it and connects anew leaves one behind each time. So the session gives up by itself, and before
//! it has answered no other is opened.

use std::time::{Duration, Instant};

use tokio::{task::JoinHandle, time::timeout};
use tokio_postgres::Client;
use walcast_pg::{ConnectConfig, PgError};

/// Both shorter than a round of the keeper.
const SESSION: &str = "set lock_timeout = '2s'; set statement_timeout = '8s'";
/// Longer than PostgreSQL itself lets somebody stand at its door (`authentication_timeout`, 60 s).
const HANDSHAKE: Duration = Duration::from_secs(65);
/// The session's own timeouts are long over: nobody is at the other end.
const MUTE: Duration = Duration::from_secs(30);

const DOING: &str = "waiting for our own connection";

pub(super) struct OwnConnection {
    connect: ConnectConfig,
    client: Option<Client>,
    connecting: Option<JoinHandle<Result<Client, PgError>>>,
    /// Something failed or was given up on it: it may still run, or a transaction be open.
    left: Option<Instant>,
}

impl OwnConnection {
    pub(super) fn new(connect: ConnectConfig) -> OwnConnection {
        OwnConnection { connect, client: None, connecting: None, left: None }
    }

    /// With no transaction open and nothing under way. May be dropped while it waits: the next call goes on there.
    pub(super) async fn client(&mut self) -> Result<&mut Client, PgError> {
        if let (Some(client), Some(left)) = (&self.client, self.left)
            && !client.is_closed()
        {
            match timeout(MUTE.saturating_sub(left.elapsed()), client.batch_execute("rollback")).await {
                Ok(Ok(())) => self.left = None,
                Ok(Err(_)) => self.client = None,
                Err(_) => {
                    self.client = None;
                    return Err(PgError::Away { doing: DOING, source: format!("it has not answered for {MUTE:?}").into() });
                }
            }
        }
        if self.client.as_ref().is_none_or(Client::is_closed) {
            (self.client, self.left) = (None, None);
            let connecting = self.connecting.get_or_insert_with(|| tokio::spawn(open(self.connect.clone())));
            let opened = connecting.await;
            self.connecting = None;
            self.client = Some(opened.map_err(|error| PgError::Unexpected { doing: DOING, what: error.to_string() })??);
        }
        self.client.as_mut().ok_or_else(|| PgError::Unexpected { doing: DOING, what: "no client".into() })
    }

    /// What was under way on it failed or was given up.
    pub(super) fn leave(&mut self) {
        self.left.get_or_insert_with(Instant::now);
    }

    /// Nobody needs it for now. What still runs on it ends first.
    pub(super) fn let_go(&mut self) {
        if self.left.is_none_or(|left| left.elapsed() > MUTE) {
            (self.client, self.left) = (None, None);
        }
    }
}

async fn open(connect: ConnectConfig) -> Result<Client, PgError> {
    let opening = async {
        let client = connect.connect().await?;
        client.batch_execute(SESSION).await.map_err(PgError::when("connecting"))?;
        Ok(client)
    };
    let silent = || PgError::Away { doing: "connecting", source: format!("no answer in {HANDSHAKE:?}").into() };
    timeout(HANDSHAKE, opening).await.unwrap_or_else(|_| Err(silent()))
}

/// Who keeps others out of tables of ours, for whoever was refused a lock: "process 7 (ann, psql) holds …".
pub(super) async fn who_locks(client: &Client) -> Option<String> {
    const SQL: &str = "
select l.pid, coalesce(a.usename::text, '?'), coalesce(nullif(a.application_name, ''), '?'), l.mode, n.nspname || '.' || c.relname
from pg_catalog.pg_locks l
join pg_catalog.pg_class c on c.oid = l.relation
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_stat_activity a on a.pid = l.pid
where l.granted and l.database = (select oid from pg_catalog.pg_database where datname = current_database())
  and l.mode in ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
  and n.nspname in ('walcast', 'pg_catalog') and l.pid <> pg_backend_pid()
order by l.pid, 5 limit 3";
    let rows = client.query_typed(SQL, &[]).await.ok()?;
    let holds = |row: &tokio_postgres::Row| {
        let (pid, user, program, mode, table): (i32, &str, &str, &str, &str) =
            (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4));
        format!("process {pid} ({user}, {program}) holds {mode} on {table}")
    };
    (!rows.is_empty()).then(|| rows.iter().map(holds).collect::<Vec<_>>().join("; "))
}
