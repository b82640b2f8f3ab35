//! The replication connection: bytes from the slot become commits, one after the other.
//!
//! Called by the engine's intake. Never decides what a commit means. Reading is pulled: a caller that does not
//! ask leaves the transport's bounded buffer full, and PostgreSQL waits.

use std::{collections::HashMap, sync::Arc, time::Duration};

use pgwire_replication::{Lsn as WireLsn, ReplicationClient, ReplicationConfig, ReplicationEvent, TlsConfig};
use walcast_model::{Column, Commit, Lsn, Table, TableId, TableName};
use walcast_pg::{Catalog, ConnectConfig, PgError, TlsMode};

use crate::{
    assemble::{AssembleError, Assembler, Step},
    pgoutput::{DecodeError, Message, Relation, decode},
};

#[derive(Debug, Clone)]
pub struct StreamConfig {
    pub connect: ConnectConfig,
    pub slot: String,
    pub publications: Vec<String>,
    /// Transport buffer, in events.
    pub buffer_events: usize,
    /// A transaction above this is not kept in memory: only what it touched is known.
    pub transaction_bytes: usize,
}

/// Which database answered: a change of either means that positions no longer compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub system_identifier: String,
    pub timeline: i32,
    /// WAL flushed when the stream was opened.
    pub flushed: Lsn,
}

#[derive(Debug)]
pub enum Heard {
    Commit(Commit),
    /// Nothing for us up to here.
    Idle {
        read_to: Lsn,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("the replication connection was lost: {0}")]
    Lost(String),
    #[error("PostgreSQL refused to stream: {0}")]
    Refused(String),
    #[error("the stream cannot be read: {0}")]
    Decode(#[from] DecodeError),
    #[error("the stream cannot be read: {0}")]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Catalog(#[from] PgError),
}

/// An authenticated replication session that does not stream yet: what it says of the server
/// is true of the stream that it then opens.
pub struct Session {
    client: ReplicationClient,
    config: StreamConfig,
}

pub struct Stream {
    client: ReplicationClient,
    assembler: Assembler,
    catalog: Catalog,
    /// A relation that is being looked up: `next` may be dropped meanwhile and called again.
    pending: Option<Relation>,
}

/// Walsender messages carry 2000-01-01 based microseconds.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

impl Session {
    /// `after`: the end of the last commit that this process has handled, or zero to begin behind what was acknowledged.
    pub async fn connect(config: StreamConfig, after: Lsn, acknowledged: Lsn) -> Result<Session, StreamError> {
        let (host, port, user, password, database) = config.connect.parts();
        let publications: pgwire_replication::Publication = config.publications.clone().into();
        let wire = if host.starts_with('/') {
            ReplicationConfig::unix(host, port, user, password, database, &config.slot, publications)
        } else {
            ReplicationConfig::new(host, user, password, database, &config.slot, publications)
                .with_port(port)
                .with_tls(tls(&config.connect))
        };
        let wire = wire
            .with_start_lsn(WireLsn::from(after.0))
            .with_ack_lsn(WireLsn::from(acknowledged.0))
            .with_status_interval(Duration::from_secs(1))
            .with_wakeup_interval(Duration::from_secs(1))
            .with_buffer_size(config.buffer_events)
            .with_application_name("walcast")
            .with_options(
                "-c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=1 -c bytea_output=hex",
            );
        let client = ReplicationClient::connect_gated(wire).await.map_err(wire_error)?;
        Ok(Session { client, config })
    }

    pub async fn identify(&mut self) -> Result<Identity, StreamError> {
        let system = self.client.identify_system().await.map_err(wire_error)?;
        Ok(Identity {
            system_identifier: system.system_id,
            timeline: system.timeline as i32,
            flushed: Lsn(system.xlogpos.as_u64()),
        })
    }

    pub async fn start(mut self, catalog: Catalog) -> Result<Stream, StreamError> {
        self.client.start().await.map_err(wire_error)?;
        self.client.wait_started().await.map_err(wire_error)?;
        Ok(Stream { client: self.client, assembler: Assembler::new(self.config.transaction_bytes), catalog, pending: None })
    }
}

impl Stream {
    /// May be dropped at any await and called again: nothing is lost.
    pub async fn next(&mut self) -> Result<Heard, StreamError> {
        loop {
            if let Some(relation) = &self.pending {
                let table = describe(&self.catalog, relation.clone()).await?;
                self.pending = None;
                self.assembler.define(table)?;
            }
            let event = self.client.recv().await.map_err(wire_error)?;
            let message = match event.ok_or_else(|| StreamError::Lost("PostgreSQL ended the stream".into()))? {
                ReplicationEvent::KeepAlive { wal_end, .. } => return Ok(Heard::Idle { read_to: Lsn(wal_end.as_u64()) }),
                ReplicationEvent::Begin { final_lsn, xid, commit_time_micros } => Message::Begin {
                    final_lsn: Lsn(final_lsn.as_u64()),
                    committed_at_us: commit_time_micros + POSTGRES_EPOCH_US,
                    xid,
                },
                ReplicationEvent::Commit { lsn, end_lsn, commit_time_micros } => Message::Commit {
                    lsn: Lsn(lsn.as_u64()),
                    end_lsn: Lsn(end_lsn.as_u64()),
                    committed_at_us: commit_time_micros + POSTGRES_EPOCH_US,
                },
                ReplicationEvent::Message { transactional, lsn, prefix, content } => {
                    Message::Message { transactional, lsn: Lsn(lsn.as_u64()), prefix: prefix.into(), content }
                }
                ReplicationEvent::XLogData { data, .. } => decode(&data)?,
                ReplicationEvent::StoppedAt { .. } => return Err(StreamError::Lost("the stream stopped".into())),
            };
            match self.assembler.push(message)? {
                Step::More => {}
                Step::Commit(commit) => return Ok(Heard::Commit(commit)),
                Step::NeedsTable(relation) => self.pending = Some(relation),
            }
        }
    }

    /// PostgreSQL may forget what lies before.
    pub fn acknowledge(&self, lsn: Lsn) {
        self.client.update_applied_lsn(WireLsn::from(lsn.0));
    }

    /// Ends the connection and waits until PostgreSQL has let go of the slot's sender.
    pub async fn close(mut self) {
        let _ = tokio::time::timeout(Duration::from_secs(3), self.client.shutdown()).await;
    }
}

/// Joins what the stream says of a relation (true at this place of the log) with what the catalog says now.
/// A column that the catalog no longer has keeps its place and its type, and is not tagged.
async fn describe(catalog: &Catalog, relation: Relation) -> Result<Table, StreamError> {
    let id = TableId(relation.id);
    let known: HashMap<String, _> = match catalog.table(id).await? {
        Some(facts) => facts.columns.into_iter().map(|column| (column.name.clone(), column)).collect(),
        None => HashMap::new(),
    };
    let types: Vec<u32> = relation.columns.iter().map(|column| column.type_oid).collect();
    let kinds = catalog.kinds(&types).await?;
    let columns = relation
        .columns
        .into_iter()
        .map(|column| {
            let now = known.get(&*column.name).filter(|now| now.type_oid == column.type_oid);
            let (type_name, kind) = match kinds.get(&column.type_oid) {
                Some((name, kind)) => (Arc::from(name.as_str()), kind.clone()),
                None => (Arc::from("unknown"), walcast_model::ValueKind::ReadBack),
            };
            Column {
                tagged: now.is_some_and(|now| now.tagged),
                name: column.name,
                type_oid: column.type_oid,
                type_name,
                kind,
                key: column.key,
            }
        })
        .collect();
    Ok(Table { id, name: TableName::new(&relation.schema, &relation.table), identity: relation.identity, columns })
}

fn tls(connect: &ConnectConfig) -> TlsConfig {
    let roots = connect.root_certificates().cloned();
    match connect.tls_mode() {
        TlsMode::Disable => TlsConfig::disabled(),
        TlsMode::Prefer => TlsConfig { mode: pgwire_replication::SslMode::Prefer, ..TlsConfig::disabled() },
        TlsMode::Require => TlsConfig::require(),
        TlsMode::VerifyCa => TlsConfig::verify_ca(roots),
        TlsMode::VerifyFull => TlsConfig::verify_full(roots),
    }
}

fn wire_error(error: pgwire_replication::PgWireError) -> StreamError {
    if error.is_server() || error.is_auth() {
        StreamError::Refused(error.to_string())
    } else {
        StreamError::Lost(error.to_string())
    }
}
