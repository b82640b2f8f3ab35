//! A real slot read through SQL: every byte that `pgoutput` writes goes through decoder and assembler, and
//! relations are described as the stream does it, from the catalog.

use std::time::Duration;

use bytes::Bytes;
use tokio_postgres::Client;
use walcast_model::{Change, Column, Commit, Item, Scope, Table, TableId, TableName};
use walcast_pg::{Catalog, ConnectConfig, Pool};
use walcast_testkit::TestPostgres;
use walcast_wal::{
    assemble::{Assembler, Step},
    pgoutput::{Relation, decode},
};

pub struct Decoded {
    pub client: Client,
    pub catalog: Catalog,
    assembler: Assembler,
    _server: TestPostgres,
}

impl Decoded {
    /// A server with these tables published, whose slot begins behind them.
    pub async fn start(schema: &str) -> Decoded {
        let server = TestPostgres::start().await.unwrap();
        let client = server.connect().await.unwrap();
        client.batch_execute("set timezone = 'UTC'; set datestyle = 'ISO'").await.unwrap();
        client.batch_execute(schema).await.unwrap();
        client.batch_execute("create publication p for all tables").await.unwrap();
        // Alone: a slot is not created in a transaction that has written.
        client.batch_execute("select pg_create_logical_replication_slot('s', 'pgoutput')").await.unwrap();
        let connect = ConnectConfig::parse(&server.url()).unwrap();
        let catalog = Catalog::new(Pool::new(&connect, 2, Duration::from_secs(30)).unwrap());
        Decoded { client, catalog, assembler: Assembler::new(64 << 20), _server: server }
    }

    /// The commits since the last call.
    pub async fn commits(&mut self) -> Vec<Commit> {
        let sql = "select data from pg_logical_slot_get_binary_changes('s', null, null, \
                   'proto_version', '1', 'publication_names', 'p', 'messages', 'true')";
        // Each call is a decoding session of its own, which describes every relation again: as a new connection does.
        self.assembler = Assembler::new(64 << 20);
        let mut commits = Vec::new();
        for row in self.client.query(sql, &[]).await.unwrap() {
            let data = Bytes::from(row.get::<_, Vec<u8>>(0));
            let message = decode(&data).unwrap_or_else(|error| panic!("{error}: {data:?}"));
            match self.assembler.push(message).unwrap() {
                Step::More => {}
                Step::NeedsTable(relation) => {
                    let table = self.describe(relation).await;
                    self.assembler.define(table).unwrap();
                }
                Step::Commit(commit) => commits.push(commit),
            }
        }
        commits
    }

    /// Runs the statements, as one transaction unless they say otherwise, and returns its commit.
    pub async fn commit_of(&mut self, sql: &str) -> Commit {
        self.client.batch_execute(sql).await.unwrap();
        let mut commits = self.commits().await;
        assert_eq!(commits.len(), 1, "{sql}");
        commits.remove(0)
    }

    async fn describe(&self, relation: Relation) -> Table {
        let oids: Vec<u32> = relation.columns.iter().map(|column| column.type_oid).collect();
        let kinds = self.catalog.kinds(&oids).await.unwrap();
        let column = |column: walcast_wal::pgoutput::RelationColumn| {
            let (type_name, kind) = kinds[&column.type_oid].clone();
            let (name, type_oid, key) = (column.name, column.type_oid, column.key);
            Column { name, type_oid, type_name: type_name.into(), kind, key, tagged: false }
        };
        Table {
            id: TableId(relation.id),
            name: TableName::new(&relation.schema, &relation.table),
            identity: relation.identity,
            columns: relation.columns.into_iter().map(column).collect(),
        }
    }
}

pub fn items(commit: &Commit) -> &[(u32, Item)] {
    match &commit.scope {
        Scope::Whole(items) => items,
        Scope::TooLarge { .. } => panic!("a transaction of a test is too large"),
    }
}

pub fn changes(commit: &Commit) -> Vec<&Change> {
    let mut found = Vec::new();
    for (_, item) in items(commit) {
        if let Item::Change(change) = item {
            found.push(change);
        }
    }
    found
}
