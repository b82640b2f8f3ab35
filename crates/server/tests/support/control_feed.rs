//! What a cache without fences would listen to: the commits of one table, straight from a slot of its own, as soon as
//! they are in the WAL. Only for controls, which must fail where Walcast must not.

use anyhow::{Context, Result};
use tokio_postgres::{Client, types::Type};
use walcast_testkit::TestPostgres;

pub struct ControlFeed {
    client: Client,
}

/// A commit's LSN and the first column of each row that it wrote.
pub type Heard = (u64, Vec<i64>);

impl ControlFeed {
    pub async fn open(postgres: &TestPostgres) -> Result<ControlFeed> {
        let client = postgres.connect().await?;
        // Its own commits must not wait for the standby that the test plays.
        client.batch_execute("set synchronous_commit = off").await?;
        client.batch_execute("select pg_create_logical_replication_slot('control', 'pgoutput')").await?;
        Ok(ControlFeed { client })
    }

    /// Everything that was written to the WAL since the last call.
    pub async fn poll(&self) -> Result<Vec<Heard>> {
        let sql = "select data from pg_logical_slot_get_binary_changes('control', null, null, \
                   'proto_version', '1', 'publication_names', 'walcast')";
        let mut heard = Vec::new();
        let mut rows = Vec::new();
        for message in self.client.query_typed(sql, &[] as &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)]).await? {
            let message: &[u8] = message.get(0);
            match message.first() {
                Some(b'I') => rows.push(first_column(&message[5..])?),
                // Type, relation, then the new row: the key does not change, so no old one is sent.
                Some(b'U') => rows.push(first_column(&message[5..])?),
                Some(b'C') if !rows.is_empty() => heard.push((u64_at(message, 2)?, std::mem::take(&mut rows))),
                _ => {}
            }
        }
        Ok(heard)
    }
}

/// `N`, number of columns, then kind, length and text of the first.
fn first_column(tuple: &[u8]) -> Result<i64> {
    anyhow::ensure!(tuple.len() > 8 && tuple[0] == b'N' && tuple[3] == b't', "not a new row: {tuple:?}");
    let length = u32::from_be_bytes(tuple[4..8].try_into()?) as usize;
    let text = tuple.get(8..8 + length).context("a row that ends early")?;
    Ok(std::str::from_utf8(text)?.parse()?)
}

fn u64_at(message: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from_be_bytes(message.get(at..at + 8).context("a message that ends early")?.try_into()?))
}
