//! A bounded set of connections. Whoever finds none free waits, and after a while is told so.
//!
//! Only `query_typed` and simple queries are used on them, which need no session state of their own
//! and so pass through a transaction-mode pooler; [`Lease::query_kept`] prepares only where nobody is in between.

use std::{
    ops::{Deref, DerefMut},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use deadpool_postgres::{Manager, ManagerConfig, Object, PoolError, RecyclingMethod, Runtime, TimeoutType};
use futures_util::TryStreamExt;
use tokio::time::Instant;
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::{ConnectConfig, ConnectError, PgError};

#[derive(Clone)]
pub struct Pool {
    inner: deadpool_postgres::Pool,
    wait: Duration,
    tls: MakeRustlsConnect,
    direct: bool,
    /// Connections that were let go while the server had not answered.
    unanswered: Arc<AtomicUsize>,
}

/// A connection on loan; goes back when dropped.
pub struct Lease {
    object: Object,
    tls: MakeRustlsConnect,
    direct: bool,
    unanswered: Arc<AtomicUsize>,
}

impl Pool {
    pub fn new(config: &ConnectConfig, connections: usize, wait: Duration) -> Result<Pool, ConnectError> {
        let tls = config.tls()?;
        let manager =
            Manager::from_config(config.driver().clone(), tls.clone(), ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let inner = deadpool_postgres::Pool::builder(manager)
            .max_size(connections.max(1))
            .wait_timeout(Some(wait))
            .create_timeout(Some(Duration::from_secs(10)))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| ConnectError::Url(error.to_string()))?;
        Ok(Pool { inner, wait, tls, direct: false, unanswered: Arc::default() })
    }

    /// No pooler is in between: a connection is one session for as long as it lives, so it may keep prepared statements.
    pub fn direct(mut self) -> Pool {
        self.direct = true;
        self
    }

    pub async fn lease(&self, doing: &'static str) -> Result<Lease, PgError> {
        let lent = |object| Lease { object, tls: self.tls.clone(), direct: self.direct, unanswered: self.unanswered.clone() };
        self.inner.get().await.map(lent).map_err(|error| match error {
            PoolError::Timeout(TimeoutType::Wait) => PgError::Busy { doing, waited_ms: self.wait.as_millis() as u64 },
            PoolError::Backend(error) => PgError::from_driver(doing, error),
            other => PgError::Away { doing, source: other.to_string().into() },
        })
    }

    /// For whoever waits less than others do. [`PgError::Busy`] only where all connections are lent and the server answers on
    /// each, as far as is known: else it is the server that keeps him waiting.
    pub async fn lease_by(&self, deadline: Instant, doing: &'static str) -> Result<Lease, PgError> {
        let began = Instant::now();
        let error = match tokio::time::timeout_at(deadline, self.lease(doing)).await {
            Ok(Err(PgError::Busy { .. })) | Err(_) => PgError::Busy { doing, waited_ms: began.elapsed().as_millis() as u64 },
            Ok(decided) => return decided,
        };
        let status = self.inner.status();
        let all_lent = status.size >= status.max_size && self.unanswered.load(Ordering::Acquire) == 0;
        let why = "no connection came free in time, and the server owes answers on others";
        Err(if all_lent { error } else { PgError::Away { doing, source: why.into() } })
    }

    /// Connections (in use, idle, allowed).
    pub fn status(&self) -> (usize, usize, usize) {
        let status = self.inner.status();
        (status.size.saturating_sub(status.available), status.available, status.max_size)
    }

    pub fn close(&self) {
        self.inner.close();
    }
}

impl Lease {
    /// For the few statements that are asked all day: where no pooler is in between they are parsed and planned once a
    /// connection. Each row is handed over as it comes, while PostgreSQL goes on sending.
    pub async fn query_kept(
        &self,
        sql: &str,
        params: &[(&(dyn ToSql + Sync), Type)],
        mut each: impl FnMut(&Row),
    ) -> Result<(), tokio_postgres::Error> {
        let rows = if self.direct {
            let types: Vec<Type> = params.iter().map(|(_, kind)| kind.clone()).collect();
            let statement = self.object.prepare_typed_cached(sql, &types).await?;
            self.object.query_raw(&statement, params.iter().map(|(value, _)| *value)).await?
        } else {
            self.query_typed_raw(sql, params.iter().map(|(value, kind)| (*value, kind.clone()))).await?
        };
        let mut rows = pin!(rows);
        while let Some(row) = rows.as_mut().try_next().await? {
            each(&row);
        }
        Ok(())
    }

    /// Closes the connection instead of giving it back: its session is in a state nobody should meet. What still runs on
    /// it is cancelled. Its place in the pool stays taken until it answers or breaks: a server that hangs would otherwise
    /// get a new connection for each that we let go, and have them all.
    pub fn discard(self) {
        let Lease { object, tls, unanswered, .. } = self;
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return drop(Object::take(object)) };
        let owed = Owed::new(unanswered);
        runtime.spawn(async move {
            let _owed = owed;
            let _ = tokio::time::timeout(Duration::from_secs(5), object.cancel_token().cancel_query(tls)).await;
            let _ = object.simple_query("rollback").await;
            drop(Object::take(object));
        });
    }
}

/// One answer that the server owes us.
struct Owed(Arc<AtomicUsize>);

impl Owed {
    fn new(unanswered: Arc<AtomicUsize>) -> Owed {
        unanswered.fetch_add(1, Ordering::AcqRel);
        Owed(unanswered)
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Deref for Lease {
    type Target = tokio_postgres::Client;

    fn deref(&self) -> &tokio_postgres::Client {
        &self.object
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut tokio_postgres::Client {
        &mut self.object
    }
}
