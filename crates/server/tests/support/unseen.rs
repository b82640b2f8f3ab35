//! Commits that are in the WAL, and streamed, while nobody can see them: what a synchronous standby does to every commit
//! for as long as it takes to answer.

use anyhow::Result;
use tokio_postgres::NoTls;
use walcast_testkit::{TestPostgres, wait};

use super::DEADLINE;

/// From here on a commit with `synchronous_commit = on` waits until [`Unseen::settle`].
pub async fn standby_never_answers(postgres: &TestPostgres) -> Result<()> {
    postgres.execute("alter system set synchronous_standby_names = 'nobody'").await?;
    postgres.execute("set synchronous_commit = local; select pg_reload_conf()").await
}

/// Commits wait for nobody again.
pub async fn no_standby(postgres: &TestPostgres) -> Result<()> {
    postgres.execute("alter system reset synchronous_standby_names").await?;
    postgres.execute("set synchronous_commit = local; select pg_reload_conf()").await
}

pub struct Unseen {
    cancel: tokio_postgres::CancelToken,
    task: tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>,
}

impl Unseen {
    /// Returns when the commit waits for its standby.
    pub async fn commit(postgres: &TestPostgres, sql: &str) -> Result<Unseen> {
        let client = postgres.connect().await?;
        let cancel = client.cancel_token();
        let sql = sql.to_owned();
        let task = tokio::spawn(async move { client.batch_execute(&sql).await });
        let looker = postgres.connect().await?;
        wait::until(DEADLINE, "the commit waits for its standby", async || {
            let sql = "select 1 from pg_stat_activity where wait_event = 'SyncRep'";
            looker.query(sql, &[]).await.is_ok_and(|rows| rows.len() == 1)
        })
        .await?;
        Ok(Unseen { cancel, task })
    }

    /// Ends the wait, not the commit: now everybody sees it.
    pub async fn settle(self) -> Result<()> {
        self.cancel.cancel_query(NoTls).await?;
        Ok(self.task.await??)
    }
}
