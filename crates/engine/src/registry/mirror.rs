//! Writes the registry to `walcast.subscription_registry`, for whoever asks by SQL: a second behind, in batches, over the pool.
//!
//! One task, started by the engine. It decides nothing and blocks nobody: where the database is away or busy, the rows wait.
//! After a round that failed, and when a crash has emptied the unlogged tables, everything of ours is written anew, so the
//! table equals the memory again whatever was lost in between.

use std::{sync::Arc, time::Duration};

use rand::Rng;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};
use tokio_util::sync::CancellationToken;
use walcast_pg::{Lease, PgError, Pool};

use super::{Connection, Listed, Registry};
use crate::Core;

const EVERY: Duration = Duration::from_secs(1);
/// Between two signs of life; each also finds out whether a crash has emptied the tables.
const BEAT: Duration = Duration::from_secs(5);
/// Rows of one statement.
const BATCH: usize = 1_000;
/// New rows of one round, and rows whose figures have changed: what the database is asked to do at most.
const NEW: usize = 10_000;
const CHANGED: usize = 2_000;
/// A row's figures are brought up to date this often at most.
const CHANGED_EVERY_MS: u64 = 10_000;
/// Heartbeats alone write a row anew this often: far below the five minutes after which a row counts as stale.
const HEARD_STEP_MS: u64 = 30_000;
const PATIENCE: Duration = Duration::from_secs(10);
const DOING: &str = "mirroring the registry";

const BEGIN: &str = "begin; set local synchronous_commit = off; set local lock_timeout = 2000";

const UPSERT: &str = "
insert into walcast.subscription_registry as r
  (instance, id, connection_id, kind, app, component, tenant, role, subject, peer, topic, bindings, since, last_heartbeat,
   delivered, dropped, outbox_bytes, outbox_frames, round_trip, errors, leak)
select $1, v.id, v.connection_id, v.kind, v.app, v.component, v.tenant, v.role, v.subject, v.peer::inet, v.topic, v.bindings::jsonb,
  now() - v.age * interval '1 millisecond', now() - v.quiet * interval '1 millisecond',
  v.delivered, v.dropped, v.outbox_bytes, v.outbox_frames, v.round_trip * interval '1 microsecond', v.errors, v.leak
from unnest($2::int8[], $3::int8[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[], $11::text[],
  $12::text[], $13::int8[], $14::int8[], $15::int8[], $16::int8[], $17::int8[], $18::int4[], $19::int8[], $20::int8[], $21::text[])
  as v (id, connection_id, kind, app, component, tenant, role, subject, peer, topic,
    bindings, age, quiet, delivered, dropped, outbox_bytes, outbox_frames, round_trip, errors, leak)
on conflict (instance, id) do update set
  tenant = excluded.tenant, role = excluded.role, subject = excluded.subject, last_heartbeat = excluded.last_heartbeat,
  delivered = excluded.delivered, dropped = excluded.dropped, outbox_bytes = excluded.outbox_bytes,
  outbox_frames = excluded.outbox_frames, round_trip = excluded.round_trip, errors = excluded.errors, leak = excluded.leak,
  written_at = now()";

/// Of us from before, of whoever held our slot before us, and of those who gave no sign of life for long.
const CLEAR: &str = "
delete from walcast.subscription_registry where ctid = any(array(
  select r.ctid from walcast.subscription_registry r
  where r.instance = $1 or not exists (
    select from walcast.registry_instances i
    where i.instance = r.instance and i.slot <> $2 and i.beat_at > now() - interval '5 minutes')
  limit 1000)) returning 1";

pub(crate) async fn run(core: Arc<Core>, cancel: CancellationToken) {
    let instance = format!("{:016x}", rand::rng().random::<u64>());
    let (pool, registry, slot) = (core.pool.clone(), core.registry.clone(), core.config.slot.clone());
    let mut mirror = Mirror { pool, registry, slot, instance, anew: true, beaten: None, rounds: 0, failing: false };
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            _ = ticks.tick() => mirror.tend().await,
        }
    }
    // Who leaves in peace leaves nothing behind.
    let _ = timeout(Duration::from_secs(3), mirror.leave()).await;
}

struct Mirror {
    pool: Pool,
    registry: Arc<Registry>,
    slot: String,
    /// Random: rows are told apart by it, over restarts too.
    instance: String,
    /// What stands in the table is not known.
    anew: bool,
    beaten: Option<Instant>,
    rounds: usize,
    failing: bool,
}

/// A row to be written.
struct Picked {
    connection: Arc<Connection>,
    listed: Arc<Listed>,
}

impl Mirror {
    async fn tend(&mut self) {
        match self.round().await {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the registry is mirrored again");
                }
            }
            // Nothing was taken out of memory: it is tried again in a second.
            Err(PgError::Busy { .. }) => {}
            Err(error) => {
                self.anew = true;
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(%error, "the registry could not be mirrored; it is tried again until it can");
                }
            }
        }
    }

    async fn round(&mut self) -> Result<(), PgError> {
        let beat_due = self.beaten.is_none_or(|beaten| beaten.elapsed() >= BEAT);
        if !self.anew && !beat_due && !self.registry.has_gone() && !self.has_news() {
            return Ok(());
        }
        let lease = self.pool.lease(DOING).await?;
        let (lease, done) = match timeout(PATIENCE, self.write(&lease, beat_due)).await {
            Ok(done) => (lease, done),
            Err(_) => (lease, Err(PgError::Away { doing: DOING, source: "no answer in time".into() })),
        };
        if done.is_err() {
            // Its transaction may still be open, or its answer on the way.
            lease.discard();
        }
        done
    }

    async fn write(&mut self, lease: &Lease, beat_due: bool) -> Result<(), PgError> {
        if self.anew {
            self.begin(lease).await?;
        } else if beat_due && !self.beat(lease).await? {
            // A crash of PostgreSQL: its unlogged tables are empty.
            self.begin(lease).await?;
        }
        // Gone first: what is picked afterwards is not among them.
        let gone = self.registry.take_gone();
        if gone.overflow {
            return self.begin(lease).await;
        }
        for rows in gone.rows.chunks(BATCH) {
            let sql = "delete from walcast.subscription_registry where instance = $1 and id = any($2)";
            let rows: Vec<i64> = rows.iter().map(|id| *id as i64).collect();
            self.run(lease, sql, &[(&self.instance, Type::TEXT), (&rows, Type::INT8_ARRAY)]).await?;
        }
        let picked = self.pick();
        for rows in picked.chunks(BATCH) {
            self.upsert(lease, rows).await?;
        }
        Ok(())
    }

    /// Nothing of ours stands in the table, and nothing of the dead.
    async fn begin(&mut self, lease: &Lease) -> Result<(), PgError> {
        self.anew = true;
        let own: [(&(dyn ToSql + Sync), Type); 2] = [(&self.instance, Type::TEXT), (&self.slot, Type::TEXT)];
        let enter = "insert into walcast.registry_instances (instance, slot) values ($1, $2) \
                     on conflict (instance) do update set beat_at = now()";
        self.run(lease, enter, &own).await?;
        while self.run(lease, CLEAR, &own).await?.len() == BATCH {}
        let dead = "delete from walcast.registry_instances \
                    where instance <> $1 and (slot = $2 or beat_at < now() - interval '5 minutes')";
        self.run(lease, dead, &own).await?;
        self.registry.forget_mirrored();
        (self.anew, self.beaten) = (false, Some(Instant::now()));
        Ok(())
    }

    /// False if our row is gone.
    async fn beat(&mut self, lease: &Lease) -> Result<bool, PgError> {
        let sql = "update walcast.registry_instances set beat_at = now() where instance = $1 returning 1";
        let known = !self.run(lease, sql, &[(&self.instance, Type::TEXT)]).await?.is_empty();
        self.beaten = Some(Instant::now());
        Ok(known)
    }

    async fn leave(&self) -> Result<(), PgError> {
        let lease = self.pool.lease(DOING).await?;
        let own: [(&(dyn ToSql + Sync), Type); 1] = [(&self.instance, Type::TEXT)];
        self.run(&lease, "delete from walcast.subscription_registry where instance = $1", &own).await?;
        self.run(&lease, "delete from walcast.registry_instances where instance = $1", &own).await?;
        Ok(())
    }

    fn has_news(&self) -> bool {
        let (now, mut news) = (self.registry.now_ms(), false);
        self.registry.each(|connection| {
            news = news || connection.with_listed(|listed| listed.iter().any(|entry| is_due(connection, entry, now)));
        });
        news
    }

    /// Marked under the lock that ending takes: what ends from here on is noted as gone, and is deleted in the next round.
    fn pick(&mut self) -> Vec<Picked> {
        self.rounds += 1;
        let now = self.registry.now_ms();
        let (mut new, mut changed) = (NEW, CHANGED);
        let mut picked = Vec::new();
        // From another shard each time: where there is more than fits, nobody always comes last.
        self.registry.each_from(self.rounds, |connection| {
            connection.with_listed(|listed| {
                for entry in listed.iter().filter(|entry| is_due(connection, entry, now)) {
                    let room = if entry.is_mirrored() { &mut changed } else { &mut new };
                    let Some(left) = room.checked_sub(1) else { continue };
                    *room = left;
                    entry.set_mirrored(true);
                    entry.note_written(figures(connection, entry), now);
                    picked.push(Picked { connection: connection.clone(), listed: entry.clone() });
                }
            });
        });
        picked
    }

    async fn upsert(&self, lease: &Lease, rows: &[Picked]) -> Result<(), PgError> {
        let now = self.registry.now_ms();
        fn column<'a, T>(rows: &'a [Picked], value: impl Fn(&'a Picked) -> T) -> Vec<T> {
            rows.iter().map(value).collect()
        }
        // In the order of the key: two statements could not wait for each other crosswise.
        let identities = column(rows, |row| row.listed.identity());
        let ids = column(rows, |row| row.listed.id as i64);
        let connections = column(rows, |row| row.connection.id as i64);
        let kinds = column(rows, |row| row.connection.kind.as_str());
        let apps = column(rows, |row| row.listed.owner.app.as_deref());
        let components = column(rows, |row| row.listed.owner.component.as_deref());
        let tenants: Vec<Option<String>> = identities.iter().map(|who| who.tenant.as_deref().map(storable)).collect();
        let roles: Vec<String> = identities.iter().map(|who| storable(&who.role)).collect();
        let subjects: Vec<Option<String>> = identities.iter().map(|who| who.subject.as_deref().map(storable)).collect();
        let peers = column(rows, |row| row.connection.peer.to_string());
        let topics = column(rows, |row| storable(&row.listed.topic));
        let bindings = column(rows, |row| &*row.listed.bindings);
        let ages = column(rows, |row| now.saturating_sub(row.listed.since_ms) as i64);
        let quiet = column(rows, |row| row.connection.quiet(now).as_millis() as i64);
        let delivered = column(rows, |row| row.listed.counts().0 as i64);
        let dropped = column(rows, |row| row.listed.counts().1 as i64);
        let bytes = column(rows, |row| row.connection.queued().1 as i64);
        let frames = column(rows, |row| row.connection.queued().0 as i32);
        let round_trips = column(rows, |row| row.connection.round_trip().map(|took| took.as_micros() as i64));
        let errors = column(rows, |row| i64::from(row.connection.errors()));
        let leaks = column(rows, |row| row.listed.leak().map(|kind| kind.as_str()));
        let parameters: [(&(dyn ToSql + Sync), Type); 21] = [
            (&self.instance, Type::TEXT),
            (&ids, Type::INT8_ARRAY),
            (&connections, Type::INT8_ARRAY),
            (&kinds, Type::TEXT_ARRAY),
            (&apps, Type::TEXT_ARRAY),
            (&components, Type::TEXT_ARRAY),
            (&tenants, Type::TEXT_ARRAY),
            (&roles, Type::TEXT_ARRAY),
            (&subjects, Type::TEXT_ARRAY),
            (&peers, Type::TEXT_ARRAY),
            (&topics, Type::TEXT_ARRAY),
            (&bindings, Type::TEXT_ARRAY),
            (&ages, Type::INT8_ARRAY),
            (&quiet, Type::INT8_ARRAY),
            (&delivered, Type::INT8_ARRAY),
            (&dropped, Type::INT8_ARRAY),
            (&bytes, Type::INT8_ARRAY),
            (&frames, Type::INT4_ARRAY),
            (&round_trips, Type::INT8_ARRAY),
            (&errors, Type::INT8_ARRAY),
            (&leaks, Type::TEXT_ARRAY),
        ];
        self.run(lease, UPSERT, &parameters).await.map(drop)
    }

    /// In a transaction of its own that waits for no standby.
    async fn run(&self, lease: &Lease, sql: &str, parameters: &[(&(dyn ToSql + Sync), Type)]) -> Result<Vec<Row>, PgError> {
        lease.batch_execute(BEGIN).await.map_err(PgError::when(DOING))?;
        let rows = lease.query_typed(sql, parameters).await.map_err(PgError::when(DOING))?;
        lease.batch_execute("commit").await.map_err(PgError::when(DOING))?;
        Ok(rows)
    }
}

/// A row that is not in the table yet, or whose figures are others than those that were written some time ago.
fn is_due(connection: &Connection, entry: &Listed, now_ms: u64) -> bool {
    if !entry.is_mirrored() {
        return true;
    }
    let (written, at) = entry.written();
    now_ms >= at + CHANGED_EVERY_MS && written != figures(connection, entry)
}

/// Everything of a row that changes, as one number.
fn figures(connection: &Connection, entry: &Listed) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    let leak = entry.leak().map(|kind| kind.as_str());
    // Coarsely what moves all the time.
    let queued_kib = connection.queued().1 >> 10;
    let round_trip_ms = connection.round_trip().map(|took| took.as_millis());
    let who = Arc::as_ptr(&entry.identity()) as usize;
    (entry.counts(), queued_kib, round_trip_ms, connection.errors(), connection.heard_ms() / HEARD_STEP_MS, leak, who)
        .hash(&mut hasher);
    hasher.finish()
}

/// Text as PostgreSQL takes it, and no more than anybody reads.
fn storable(text: &str) -> String {
    text.chars().filter(|letter| *letter != '\0').take(1_000).collect()
}
