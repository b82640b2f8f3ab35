//! A read enters: how fresh it must be, tickets and puts.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio_postgres::types::Type;
use walcast_cache::{
    Arrival, AtLeast, Hearing, Lookup, MissReason, NewValue, Precondition, PutError, Stale, Stored, TicketError,
};
use walcast_model::{CacheKey, Fence, Lsn, Position, Snapshot, TableName, Tag, Xid};
use walcast_pg::{ColumnFacts, PgError};

use crate::{Core, Engine, config::Deaf, freshness::Freshness};

/// From what a value that is put was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// Read in a transaction begun after the ticket was issued.
    Ticket(String),
    /// The application's own write: contains this transaction.
    By(u64),
    /// The caller did not say: good only where the namespace's values are not from this database.
    Unsaid,
}

/// See [`Engine::cache_begin_put`].
pub struct Put {
    key: CacheKey,
    value: NewValue,
    made_of: MadeOf,
}

enum MadeOf {
    Fence(Fence),
    Elsewhere(Arrival),
    Write(Xid),
}

#[derive(Debug, thiserror::Error)]
pub enum PutFailure {
    #[error(transparent)]
    Put(#[from] PutError),
    #[error("the ticket is not good: {0}")]
    Ticket(TicketError),
    #[error(
        "namespace `{0}` takes values from the database only: put with the Walcast-Ticket of a miss, or set source = \"external\" for it"
    )]
    TicketRequired(String),
    #[error("{0} is not raised by commits: {1}")]
    UntrackedTag(Tag, String),
    #[error("a value that depends on more than single rows cannot be put by the transaction that wrote one of them")]
    ManyRows,
    #[error("transaction {0} has not touched each of the value's tags, as far as the stream tells")]
    UnknownTransaction(u64),
    #[error(transparent)]
    Database(#[from] PgError),
}

/// A shared fence is good for this long; an older one is only more careful, so this is about hit rate.
const FENCE_AGE: Duration = Duration::from_millis(5);
const WAIT_FOR_STREAM: Duration = Duration::from_secs(5);
/// A miss without a ticket is better than a late one.
const TICKET_WAIT: Duration = Duration::from_secs(1);

impl Engine {
    pub async fn cache_get(&self, key: &CacheKey, freshness: Freshness) -> Lookup {
        let core = &self.core;
        let at_least = match core.at_least(freshness).await {
            Some(at_least) => at_least,
            None => return Lookup::Miss { reason: MissReason::NotHearing },
        };
        core.as_configured(core.cache.get(key, at_least).await)
    }

    /// For the value that the caller is about to read. None while the database is away: nothing could be admitted.
    pub async fn cache_ticket(&self, key: &CacheKey) -> Option<String> {
        self.cache_tickets(&[key]).await.pop().flatten()
    }

    /// The same for one of those who were answered a stale entry: he computes it, the others need not. For 10 seconds, or
    /// until he puts it.
    pub async fn cache_refresh_ticket(&self, key: &CacheKey) -> Option<String> {
        if !self.core.cache.take_turn(key) {
            return None;
        }
        let ticket = self.cache_ticket(key).await;
        if ticket.is_none() {
            self.core.cache.give_turn_back(key);
        }
        ticket
    }

    /// Of those who find a key missing, is it for this one to compute it? Only advice: each has a ticket.
    pub fn cache_should_compute(&self, key: &CacheKey) -> bool {
        self.core.cache.take_first_turn(key)
    }

    pub async fn cache_put(&self, put: Put, precondition: &Precondition) -> Result<Stored, PutFailure> {
        self.core.put(put, precondition).await
    }

    /// Stores them while the caller goes on; who is told that they were taken is not told what became of them. Given back
    /// if too much waits already.
    pub fn cache_put_soon<P>(&self, puts: P) -> Result<(), P>
    where
        P: AsRef<[Put]> + IntoIterator<Item = Put> + Send + 'static,
    {
        let cache = &self.core.cache;
        let bytes = puts.as_ref().iter().map(|put| put.value.value.len()).sum();
        let Some(room) = cache.soon_room(bytes) else { return Err(puts) };
        let core = self.core.clone();
        let puts: Vec<Put> = puts.into_iter().collect();
        cache.soon(room, async move {
            let outcomes = join_all(puts.into_iter().map(|put| core.put(put, &Precondition::None))).await;
            outcomes.iter().filter(|outcome| !matches!(outcome, Ok(Stored::Yes { .. }))).count()
        });
        Ok(())
    }

    /// A put that came. What is wrong in itself is refused at once; a value from elsewhere has its place behind those of its
    /// key that came before, whenever it is stored.
    pub fn cache_begin_put(&self, key: &CacheKey, value: NewValue, written: Written) -> Result<Put, PutFailure> {
        let cache = &self.core.cache;
        let namespace = cache.namespace(key.namespace());
        let namespace = namespace.ok_or_else(|| PutError::UnknownNamespace(key.namespace().to_owned()))?;
        if let Some(tag) = value.tags.iter().chain(&namespace.tags).find(|tag| tag.is_companion()) {
            let why = "`*` stands for the values that a commit cannot tell; use the tag of a value, or the table's".to_owned();
            return Err(PutFailure::UntrackedTag(tag.clone(), why));
        }
        let made_of = match written {
            Written::Ticket(ticket) => MadeOf::Fence(cache.check_ticket(&ticket, key).map_err(PutFailure::Ticket)?),
            Written::Unsaid if namespace.external => MadeOf::Elsewhere(cache.arrive(key)),
            Written::Unsaid => return Err(PutFailure::TicketRequired(key.namespace().to_owned())),
            Written::By(xid) => MadeOf::Write(Xid(xid)),
        };
        cache.check(key, &value)?;
        Ok(Put { key: key.clone(), value, made_of })
    }

    pub fn position(&self) -> Position {
        let lsn = self.core.progress.invalidated();
        Position { epoch: self.core.progress.epoch(), lsn, index: 0 }
    }
}

impl Core {
    /// While we do not hear, the config may prefer a miss to what nobody can vouch for.
    pub(crate) fn as_configured(&self, look: Lookup) -> Lookup {
        match look {
            Lookup::Hit { stale: Some(Stale::StreamLost), .. } if self.config.cache.deaf == Deaf::Compute => {
                Lookup::Miss { reason: MissReason::NotHearing }
            }
            look => look,
        }
    }

    async fn put(&self, Put { key, value, made_of }: Put, precondition: &Precondition) -> Result<Stored, PutFailure> {
        let namespace = self.cache.namespace(key.namespace());
        let namespace = namespace.ok_or_else(|| PutError::UnknownNamespace(key.namespace().to_owned()))?;
        let all_tags: Vec<Tag> = value.tags.iter().chain(&namespace.tags).cloned().collect();
        let of_tables = if namespace.external { Vec::new() } else { self.check_tags(&all_tags).await? };
        let fence = match made_of {
            MadeOf::Elsewhere(arrival) => return Ok(self.cache.put_external(arrival, &key, value, precondition).await?),
            MadeOf::Fence(fence) => fence,
            // The writer of a row holds its lock, so nobody wrote it after him unseen; of other rows he can vouch for nothing.
            MadeOf::Write(_) if of_tables.iter().any(|tag| !tag.one_row) => return Err(PutFailure::ManyRows),
            MadeOf::Write(xid) => {
                let tags: Vec<Tag> = of_tables.into_iter().map(|of_table| of_table.tag).collect();
                self.fence_of(xid, &tags).await?
            }
        };
        Ok(self.cache.put_if(&key, value, fence, precondition).await?)
    }

    /// Floor and W first, then the snapshot: what moves in between only makes the fence more careful.
    pub(crate) async fn fence(&self) -> Result<Fence, PgError> {
        if let Some((fence, at)) = self.shared_fence.lock().clone()
            && at.elapsed() <= FENCE_AGE
            // Whoever fills what a commit has just invalidated wants a snapshot that sees it.
            && fence.settled == self.progress.settled()
            && fence.floor == self.clock.floor()
        {
            return Ok(fence);
        }
        let (floor, settled) = (self.clock.floor(), self.progress.settled());
        let sample = self.sampler.fresh().await?;
        let fence = Fence { snapshot: sample.snapshot, settled, floor };
        *self.shared_fence.lock() = Some((fence.clone(), sample.taken_at));
        Ok(fence)
    }

    /// For a ticket. None while commits are not heard, since nothing is stored then, or if a database that hangs would
    /// make a miss wait.
    pub(crate) async fn fence_in_time(&self) -> Option<Fence> {
        if self.cache.hearing() != Hearing::Live {
            return None;
        }
        tokio::time::timeout(TICKET_WAIT, self.fence()).await.ok()?.ok()
    }

    /// Waits for the stream where the read asks for it. None: it did not come.
    pub(crate) async fn at_least(&self, freshness: Freshness) -> Option<AtLeast> {
        match freshness {
            Freshness::Any => Some(AtLeast::Any),
            Freshness::Contains(xid) => Some(AtLeast::Xid(Xid(xid))),
            Freshness::AtLeast(position) if position.epoch != self.progress.epoch() => None,
            Freshness::AtLeast(position) => {
                let heard = position.lsn <= self.progress.invalidated()
                    || (self.progress.wait_read(position.lsn, WAIT_FOR_STREAM).await
                        && self.suspected.passed(position.lsn, WAIT_FOR_STREAM).await
                        && self.cascades.passed(position.lsn, WAIT_FOR_STREAM).await);
                heard.then_some(AtLeast::Lsn(position.lsn))
            }
        }
    }

    /// The application wrote and knows the result: the value contains everything up to its own commit, and
    /// falls with any later one.
    async fn fence_of(&self, xid: Xid, tags: &[Tag]) -> Result<Fence, PutFailure> {
        let floor = self.clock.floor();
        let until = Instant::now() + WAIT_FOR_STREAM;
        loop {
            // Each of its tables' tags: of rows that it did not write, a transaction can vouch for nothing.
            let raised: Option<Vec<Lsn>> = tags.iter().map(|tag| self.clock.raised_by(tag.hash(), xid)).collect();
            if let Some(lsn) = raised.and_then(|raised| raised.into_iter().max())
                && lsn <= self.progress.settled()
            {
                return Ok(Fence { snapshot: Snapshot::blind(), settled: lsn, floor });
            }
            if Instant::now() >= until {
                return Err(PutFailure::UnknownTransaction(xid.0));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A tag that looks like a table's must be one that commits raise, spelled as they spell it, or the value would
    /// never fall. Answers the tags that are a table's.
    async fn check_tags(&self, tags: &[Tag]) -> Result<Vec<OfTable>, PutFailure> {
        let mut of_tables = Vec::new();
        let rules = self.tag_rules.resolved();
        for tag in tags {
            match rules.rules.could_raise(tag) {
                // A rule's tag stands for many rows: nobody who wrote one of them can vouch for the others.
                Some(true) => {
                    of_tables.push(OfTable { tag: tag.clone(), one_row: false });
                    continue;
                }
                Some(false) => {
                    let why = "rules of this word spell theirs otherwise; a value is escaped as in row tags".to_owned();
                    return Err(PutFailure::UntrackedTag(tag.clone(), why));
                }
                None => {}
            }
            let Some((table, row)) = tag.names() else { continue };
            // No such table: a tag of the application's own.
            let Some(facts) = self.tracked(&table).await? else { continue };
            let refused = |why: &str| Err(PutFailure::UntrackedTag(tag.clone(), why.to_owned()));
            if !facts.published {
                return refused("the table is not in the cache's publication; `walcast migrate` adds it");
            }
            let mut one_row = false;
            let raised = match row {
                None => Some(Tag::table(&table)),
                Some((column, value)) => match facts.columns.iter().find(|known| known.name == column) {
                    Some(known) => {
                        one_row = known.unique;
                        as_streamed(&known.type_name, &value).and_then(|value| Tag::row(&table, &column, &value))
                    }
                    None => {
                        return refused(
                            "the column is in no key, index or foreign key, or its type cannot be compared by text; use the table's tag",
                        );
                    }
                },
            };
            match raised {
                Some(raised) if raised == *tag => of_tables.push(OfTable { tag: raised, one_row }),
                Some(raised) => return refused(&format!("commits spell it {raised}")),
                None => return refused("no row can have that value"),
            }
        }
        Ok(of_tables)
    }

    async fn tracked(&self, table: &TableName) -> Result<Option<Tracked>, PgError> {
        let generation = {
            let book = self.tracked.lock();
            if let Some((tracked, at)) = book.known.get(table)
                && at.elapsed() < Duration::from_secs(5)
            {
                return Ok(tracked.clone());
            }
            book.generation
        };
        let tracked = match self.catalog.table_id(table).await? {
            None => None,
            Some(id) => {
                let columns = self.catalog.table(id).await?.map(|facts| facts.columns).unwrap_or_default();
                let columns = columns.into_iter().filter(|column| column.tagged && !column.generated).collect();
                Some(Tracked { published: self.is_published(table).await?, columns })
            }
        };
        let mut book = self.tracked.lock();
        // Names come from callers: the map must not grow with what they invent.
        if book.known.len() >= 1_000 {
            book.known.clear();
        }
        // Redefined while we read: it serves this caller, whose ticket is older than that, and nobody else.
        if book.generation == generation {
            book.known.insert(table.clone(), (tracked.clone(), Instant::now()));
        }
        Ok(tracked)
    }

    async fn is_published(&self, table: &TableName) -> Result<bool, PgError> {
        let doing = "reading the publication";
        let lease = self.pool.lease(doing).await?;
        let (publication, schema, name) = (self.config.publication_cache.as_str(), table.schema(), table.table());
        let sql = "select exists (select from pg_catalog.pg_publication_tables where pubname = $1 and schemaname = $2 and tablename = $3)";
        let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] =
            &[(&publication, Type::TEXT), (&schema, Type::TEXT), (&name, Type::TEXT)];
        let rows = lease.query_typed(sql, params).await.map_err(PgError::when(doing))?;
        Ok(rows.first().is_some_and(|row| row.get(0)))
    }
}

/// A tag that commits raise, and whether it means one row.
struct OfTable {
    tag: Tag,
    one_row: bool,
}

/// What commits raise for a table.
#[derive(Debug, Clone)]
pub struct Tracked {
    published: bool,
    columns: Vec<ColumnFacts>,
}

/// What was read of the catalog lately, for the tags of puts.
#[derive(Default)]
pub struct TrackedTables {
    known: HashMap<TableName, (Option<Tracked>, Instant)>,
    /// Counts redefinitions: what was read before one is not kept after it.
    generation: u64,
}

impl TrackedTables {
    pub fn forget(&mut self, table: &TableName) {
        self.generation += 1;
        self.known.remove(table);
    }
}

/// A tag's value as the stream prints a column of this type; none if no row can have it.
fn as_streamed(type_name: &str, value: &str) -> Option<String> {
    match type_name {
        "int2" | "int4" | "int8" => value.parse::<i64>().ok().map(|number| number.to_string()),
        "bool" => matches!(value, "t" | "f").then(|| value.to_owned()),
        "uuid" => {
            let hyphen = |at: usize| matches!(at, 8 | 13 | 18 | 23);
            let fits = |(at, c): (usize, char)| if hyphen(at) { c == '-' } else { c.is_ascii_hexdigit() };
            (value.len() == 36 && value.char_indices().all(fits)).then(|| value.to_ascii_lowercase())
        }
        _ => Some(value.to_owned()),
    }
}
