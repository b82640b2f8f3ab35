//! Asks the primary which commits are visible right now, once for all who wait.
//!
//! One connection, one statement: snapshot, recovery state and WAL position. Whoever asks gets a sample
//! that was taken after the question; questions that arrive meanwhile share the next one.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_postgres::{Client, Statement};
use walcast_model::{Lsn, Snapshot};

use crate::{ConnectConfig, PgError};

#[derive(Debug, Clone)]
pub struct Sample {
    /// On a standby already reduced to what is certainly visible there.
    pub snapshot: Snapshot,
    pub in_recovery: bool,
    /// Read after the snapshot: every commit that the snapshot sees lies before it.
    pub wal_insert: Lsn,
    pub taken_at: Instant,
}

/// A handle; the task ends when the last handle is dropped.
#[derive(Clone)]
pub struct Sampler {
    questions: mpsc::Sender<oneshot::Sender<Result<Sample, String>>>,
    latest: watch::Receiver<Option<Sample>>,
}

const DOING: &str = "sampling the snapshot";
/// A server that does not answer a one-line question in this time is away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// More questions than this wait in their senders.
const QUESTIONS: usize = 256;

impl Sampler {
    pub fn start(config: ConnectConfig) -> Sampler {
        let (questions, inbox) = mpsc::channel(QUESTIONS);
        let (tell, latest) = watch::channel(None);
        tokio::spawn(answer(config, inbox, tell));
        Sampler { questions, latest }
    }

    /// A sample taken after this call.
    pub async fn fresh(&self) -> Result<Sample, PgError> {
        let (reply, answer) = oneshot::channel();
        let gone = || PgError::Away { doing: DOING, source: "the sampler has ended".into() };
        self.questions.send(reply).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map_err(|why| PgError::Away { doing: DOING, source: why.into() })
    }

    /// The newest sample, if it is not older than `max_age`.
    pub fn latest(&self, max_age: Duration) -> Option<Sample> {
        self.latest.borrow().clone().filter(|sample| sample.taken_at.elapsed() <= max_age)
    }
}

async fn answer(
    config: ConnectConfig,
    mut inbox: mpsc::Receiver<oneshot::Sender<Result<Sample, String>>>,
    tell: watch::Sender<Option<Sample>>,
) {
    let mut client = None;
    let mut waiting = Vec::new();
    while let Some(first) = inbox.recv().await {
        waiting.push(first);
        while let Ok(next) = inbox.try_recv() {
            waiting.push(next);
        }
        // A connection that broke since the last question deserves one new try before anyone is told.
        let mut result = sample(&config, &mut client).await;
        if result.is_err() && client.is_none() {
            result = sample(&config, &mut client).await;
        }
        match result {
            Ok(sample) => {
                tell.send_replace(Some(sample.clone()));
                waiting.drain(..).for_each(|reply| drop(reply.send(Ok(sample.clone()))));
            }
            Err(error) => {
                tell.send_replace(None);
                let why = error.to_string();
                waiting.drain(..).for_each(|reply| drop(reply.send(Err(why.clone()))));
            }
        }
    }
}

/// Planned once per connection: this is asked after almost every commit. The replication connection beside it
/// cannot pass through a pooler either.
struct Connection {
    client: Client,
    question: Statement,
}

async fn open(config: &ConnectConfig) -> Result<Connection, PgError> {
    const SQL: &str = "select s.snapshot::text, r.recovering, \
         (case when r.recovering then pg_last_wal_replay_lsn() else pg_current_wal_insert_lsn() end)::text \
         from (select pg_current_snapshot() as snapshot offset 0) s, (select pg_is_in_recovery() as recovering offset 0) r";
    let client = config.connect().await?;
    let question = client.prepare_typed(SQL, &[]).await.map_err(PgError::when(DOING))?;
    Ok(Connection { client, question })
}

async fn sample(config: &ConnectConfig, kept: &mut Option<Connection>) -> Result<Sample, PgError> {
    // Taken out for the time of the question: whatever goes wrong, the next one begins with a new connection.
    let connection = kept.take().filter(|connection| !connection.client.is_closed());
    // Opening too: a peer that accepts and says nothing would hold up whoever asks.
    let answered = tokio::time::timeout(ANSWER_TIMEOUT, async {
        let connection = match connection {
            Some(connection) => connection,
            None => open(config).await?,
        };
        Ok((ask(&connection).await?, connection))
    });
    let (answer, connection) =
        answered.await.map_err(|_| PgError::Away { doing: DOING, source: "no answer in 5 s".into() })??;
    *kept = Some(connection);
    Ok(answer)
}

async fn ask(connection: &Connection) -> Result<Sample, PgError> {
    let rows = connection.client.query(&connection.question, &[]).await.map_err(PgError::when(DOING))?;
    let row = rows.first().ok_or_else(|| unexpected("no row"))?;
    let text = |index: usize| row.try_get::<_, &str>(index).map_err(|error| unexpected(&error.to_string()));
    let snapshot: Snapshot = text(0)?.parse().map_err(|error| unexpected(&format!("{error}")))?;
    let in_recovery: bool = row.try_get(1).map_err(|error| unexpected(&error.to_string()))?;
    let wal_insert: Lsn = text(2)?.parse().map_err(|error| unexpected(&format!("{error}")))?;
    let snapshot = if in_recovery { snapshot.on_standby() } else { snapshot };
    Ok(Sample { snapshot, in_recovery, wal_insert, taken_at: Instant::now() })
}

fn unexpected(what: &str) -> PgError {
    PgError::Unexpected { doing: DOING, what: what.to_owned() }
}
