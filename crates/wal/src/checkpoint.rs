//! What survives a restart: epoch and floor (logged), the tag clock, what stands beside it, and the sentinel (unlogged).
//!
//! The unlogged tables are emptied by crash recovery. That is their use: when the sentinel row is gone,
//! transaction ids may have been used again and asynchronous commits are lost, so no older entry may be answered.
//! Everything is written with `synchronous_commit = off`: a dead standby must not stop us, and a write
//! that a crash loses was lost together with the sentinel.

use tokio_postgres::{Client, types::Type};
use walcast_model::{Epoch, Floor, Lsn, SlotImage, Stamp, TagClock, TagHash, Xid};
use walcast_pg::PgError;

use crate::{Identity, SlotState};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub epoch: Epoch,
    pub floor: Floor,
    /// The clock holds every commit up to here; nothing above may be acknowledged.
    pub covered: Lsn,
    /// Why a new epoch or floor began, for the log and for `resync`.
    pub moved: Option<&'static str>,
}

const READING: &str = "reading the checkpoint";
const WRITING: &str = "writing the checkpoint";
/// Slots per statement.
const BATCH: usize = 2_000;

/// What is known of the slot, the server and ourselves when the stream is about to be opened.
pub struct Attaching<'a> {
    pub slot_name: &'a str,
    pub slot: &'a SlotState,
    pub identity: &'a Identity,
    /// Fingerprint of policies, privileges, keys, indexes and tag rules: when they changed behind our back,
    /// the checkpoint says nothing about entries that were made under the old ones.
    pub rules: &'a str,
    /// The standing of this process before it lost the stream, none at its start.
    pub running: Option<&'a Standing>,
    pub fresh_epoch: Epoch,
}

/// Decides epoch and floor on attaching, loads the clock's checkpoint where it still holds, and writes the decision back.
pub async fn attach(client: &mut Client, facts: &Attaching<'_>, clock: &TagClock) -> Result<Standing, PgError> {
    let transaction = client.transaction().await.map_err(PgError::when(READING))?;
    transaction.batch_execute("set local synchronous_commit = off").await.map_err(PgError::when(READING))?;
    let sql = "select epoch, system_identifier, timeline, slot, floor from walcast.state";
    let rows = transaction.query_typed(sql, &[]).await.map_err(PgError::when(READING))?;
    let state = rows.first().map(|row| State {
        epoch: row.get::<_, &str>(0).parse().unwrap_or_default(),
        system_identifier: row.get::<_, Option<String>>(1).unwrap_or_default(),
        timeline: row.get::<_, Option<i32>>(2).unwrap_or_default(),
        slot: row.get::<_, Option<String>>(3).unwrap_or_default(),
        floor: Floor(row.get::<_, i64>(4).max(0) as u64),
    });
    let sql = "select epoch, floor, clock_lsn::text, hash_version, slots, rules_hash from walcast.sentinel";
    let rows = transaction.query_typed(sql, &[]).await.map_err(PgError::when(READING))?;
    let sentinel = rows.first().map(|row| Sentinel {
        epoch: row.get::<_, &str>(0).parse().unwrap_or_default(),
        floor: Floor(row.get::<_, i64>(1).max(0) as u64),
        covered: row.get::<_, &str>(2).parse().unwrap_or_default(),
        hash_version: row.get(3),
        slots: row.get(4),
        same_rules: row.get::<_, &str>(5) == facts.rules,
    });

    let standing = decide(facts, clock, state.as_ref(), sentinel.as_ref());
    if standing.moved.is_some() || sentinel.is_none() {
        let sql = "delete from walcast.clock; delete from walcast.selections";
        transaction.batch_execute(sql).await.map_err(PgError::when(WRITING))?;
    } else if facts.running.is_none() {
        load(&transaction, clock).await?;
        clock.note_covered(standing.covered);
    }
    let (epoch, floor, timeline) = (standing.epoch.to_string(), standing.floor.0 as i64, facts.identity.timeline);
    let system = facts.identity.system_identifier.as_str();
    let sql = "insert into walcast.state (epoch, system_identifier, timeline, slot, floor) values ($1, $2, $3, $4, $5) \
               on conflict (\"only\") do update set epoch = excluded.epoch, system_identifier = excluded.system_identifier, \
               timeline = excluded.timeline, slot = excluded.slot, floor = excluded.floor, updated_at = now()";
    let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] = &[
        (&epoch, Type::TEXT),
        (&system, Type::TEXT),
        (&timeline, Type::INT4),
        (&facts.slot_name, Type::TEXT),
        (&floor, Type::INT8),
    ];
    transaction.query_typed(sql, params).await.map_err(PgError::when(WRITING))?;
    // What is settled is not known yet; nothing is claimed.
    write_sentinel(&transaction, &standing, clock, facts.rules, Lsn::ZERO).await?;
    transaction.commit().await.map_err(PgError::when(WRITING))?;
    Ok(standing)
}

struct State {
    epoch: Epoch,
    system_identifier: String,
    timeline: i32,
    slot: String,
    floor: Floor,
}

struct Sentinel {
    epoch: Epoch,
    floor: Floor,
    covered: Lsn,
    hash_version: i32,
    slots: i32,
    same_rules: bool,
}

fn decide(facts: &Attaching<'_>, clock: &TagClock, state: Option<&State>, sentinel: Option<&Sentinel>) -> Standing {
    let Attaching { slot_name, slot, identity, running, fresh_epoch, .. } = *facts;
    let floor = state.map_or(Floor(0), |state| state.floor).max(running.map_or(Floor(0), |r| r.floor));
    let next_floor = Floor(floor.0 + 1);
    let new_epoch = |why| Standing { epoch: fresh_epoch, floor: next_floor, covered: Lsn::ZERO, moved: Some(why) };
    let acknowledged = match slot {
        SlotState::Created { .. } => return new_epoch("the replication slot is new"),
        SlotState::Found { acknowledged } => *acknowledged,
    };
    let Some(state) = state else { return new_epoch("there is no record of this slot") };
    if state.slot != slot_name {
        return new_epoch("the slot has another name");
    }
    if state.system_identifier != identity.system_identifier {
        return new_epoch("this is another database cluster");
    }
    if state.timeline != identity.timeline {
        return new_epoch("the database was promoted or rewound");
    }
    let new_floor = |why| Standing { epoch: state.epoch, floor: next_floor, covered: Lsn::ZERO, moved: Some(why) };
    if sentinel.is_some_and(|sentinel| identity.flushed < sentinel.covered) {
        return new_epoch("the database was rewound");
    }
    let Some(sentinel) = sentinel else { return new_floor("the database went through crash recovery") };
    if let Some(running) = running {
        // The clock in memory is newer than any checkpoint of it.
        return Standing { epoch: state.epoch, floor: running.floor.max(state.floor), covered: running.covered, moved: None };
    }
    let matching = sentinel.epoch == state.epoch
        && sentinel.floor == state.floor
        && sentinel.hash_version == TagHash::VERSION
        && sentinel.slots as usize == clock.slot_count();
    if !matching {
        return new_floor("the tag clock's checkpoint has another form");
    }
    if !sentinel.same_rules {
        return new_floor("policies, privileges, keys, indexes or tag rules changed while nobody listened");
    }
    if sentinel.covered < acknowledged {
        return new_floor("the tag clock's checkpoint is behind the slot");
    }
    Standing { epoch: state.epoch, floor: state.floor, covered: sentinel.covered, moved: None }
}

/// An invalidation that no tag expresses, as its owner writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectionImage {
    pub stamp: Stamp,
    /// Unix milliseconds.
    pub heard_at_ms: u64,
    /// A JSON object.
    pub content: String,
}

/// What stands beside the clock, and must be saved with it.
#[derive(Debug, Default)]
pub struct Beside {
    /// None: as it was saved last.
    pub selections: Option<Vec<SelectionImage>>,
}

/// What stood beside the clock at the last checkpoint. Read it once the clock has been loaded.
pub async fn selections(client: &Client) -> Result<Vec<SelectionImage>, PgError> {
    let sql = "select lsn::text, xid::text, (extract(epoch from heard_at) * 1000)::int8, content::text from walcast.selections \
               order by lsn";
    let wrong = |what: String| PgError::Unexpected { doing: READING, what };
    let image = |row: &tokio_postgres::Row| {
        let lsn = row.get::<_, &str>(0).parse().map_err(|error| wrong(format!("{error}")))?;
        let xid = row.get::<_, &str>(1).parse().map(Xid).map_err(|error| wrong(format!("{error}")))?;
        let heard_at_ms = row.get::<_, i64>(2).max(0) as u64;
        Ok(SelectionImage { stamp: Stamp { lsn, xid }, heard_at_ms, content: row.get(3) })
    };
    client.query_typed(sql, &[]).await.map_err(PgError::when(READING))?.iter().map(image).collect()
}

/// Writes what changed since the last checkpoint; from then on `up_to` may be acknowledged.
/// `up_to` must have been invalidated, and all up to `settled` been settled, before the call: a snapshot that sees the
/// sentinel sees them too.
pub async fn save(
    client: &mut Client,
    clock: &TagClock,
    beside: &Beside,
    standing: &Standing,
    rules: &str,
    up_to: Lsn,
    settled: Lsn,
) -> Result<Standing, PgError> {
    let images = clock.to_save(standing.covered, up_to);
    let transaction = client.transaction().await.map_err(PgError::when(WRITING))?;
    transaction.batch_execute("set local synchronous_commit = off").await.map_err(PgError::when(WRITING))?;
    for batch in images.chunks(BATCH) {
        let indexes: Vec<i32> = batch.iter().map(|image| image.index as i32).collect();
        let dropped: Vec<String> = batch.iter().map(|image| image.dropped.to_string()).collect();
        let stamps: Vec<Vec<u8>> = batch.iter().map(|image| encode(&image.stamps)).collect();
        let sql = "insert into walcast.clock (slot_index, dropped, stamps) \
                   select i, d::pg_lsn, s from unnest($1::int4[], $2::text[], $3::bytea[]) as x(i, d, s) \
                   on conflict (slot_index) do update set dropped = excluded.dropped, stamps = excluded.stamps";
        let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] =
            &[(&indexes, Type::INT4_ARRAY), (&dropped, Type::TEXT_ARRAY), (&stamps, Type::BYTEA_ARRAY)];
        transaction.query_typed(sql, params).await.map_err(PgError::when(WRITING))?;
    }
    if let Some(selections) = &beside.selections {
        write_selections(&transaction, selections).await?;
    }
    let covered = Standing { covered: up_to, ..standing.clone() };
    write_sentinel(&transaction, &covered, clock, rules, settled).await?;
    transaction.commit().await.map_err(PgError::when(WRITING))?;
    clock.note_saved();
    Ok(covered)
}

async fn write_selections(transaction: &tokio_postgres::Transaction<'_>, selections: &[SelectionImage]) -> Result<(), PgError> {
    transaction.batch_execute("delete from walcast.selections").await.map_err(PgError::when(WRITING))?;
    let text = |pick: fn(&SelectionImage) -> String| selections.iter().map(pick).collect::<Vec<String>>();
    let (lsns, xids) = (text(|one| one.stamp.lsn.to_string()), text(|one| one.stamp.xid.to_string()));
    let (heard_at, contents) =
        (selections.iter().map(|one| one.heard_at_ms as i64).collect::<Vec<_>>(), text(|one| one.content.clone()));
    let sql = "insert into walcast.selections (lsn, xid, heard_at, content) \
               select l::pg_lsn, x::xid8, to_timestamp(h / 1000.0), c::jsonb \
               from unnest($1::text[], $2::text[], $3::int8[], $4::text[]) as v (l, x, h, c)";
    let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] =
        &[(&lsns, Type::TEXT_ARRAY), (&xids, Type::TEXT_ARRAY), (&heard_at, Type::INT8_ARRAY), (&contents, Type::TEXT_ARRAY)];
    transaction.query_typed(sql, params).await.map_err(PgError::when(WRITING))?;
    Ok(())
}

async fn write_sentinel(
    transaction: &tokio_postgres::Transaction<'_>,
    standing: &Standing,
    clock: &TagClock,
    rules: &str,
    settled: Lsn,
) -> Result<(), PgError> {
    let settled = settled.to_string();
    let (epoch, floor, covered) = (standing.epoch.to_string(), standing.floor.0 as i64, standing.covered.to_string());
    let (version, slots) = (TagHash::VERSION, clock.slot_count() as i32);
    let sql = "insert into walcast.sentinel (epoch, floor, clock_lsn, hash_version, slots, rules_hash, settled_lsn) \
               values ($1, $2, $3::text::pg_lsn, $4, $5, $6, $7::text::pg_lsn) on conflict (\"only\") do update set epoch = excluded.epoch, \
               floor = excluded.floor, clock_lsn = excluded.clock_lsn, hash_version = excluded.hash_version, \
               slots = excluded.slots, rules_hash = excluded.rules_hash, settled_lsn = excluded.settled_lsn, updated_at = now()";
    let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] = &[
        (&epoch, Type::TEXT),
        (&floor, Type::INT8),
        (&covered, Type::TEXT),
        (&version, Type::INT4),
        (&slots, Type::INT4),
        (&rules, Type::TEXT),
        (&settled, Type::TEXT),
    ];
    transaction.query_typed(sql, params).await.map_err(PgError::when(WRITING))?;
    Ok(())
}

async fn load(transaction: &tokio_postgres::Transaction<'_>, clock: &TagClock) -> Result<(), PgError> {
    let sql = "select slot_index, dropped::text, stamps from walcast.clock";
    for row in transaction.query_typed(sql, &[]).await.map_err(PgError::when(READING))? {
        let wrong = |what: String| PgError::Unexpected { doing: READING, what };
        let image = SlotImage {
            index: row.get::<_, i32>(0) as u32,
            dropped: row.get::<_, &str>(1).parse().map_err(|error| wrong(format!("{error}")))?,
            stamps: decode(row.get(2)).ok_or_else(|| wrong("a clock slot of a wrong length".into()))?,
        };
        if !clock.load(&image) {
            return Err(wrong(format!("clock slot {} of {}", image.index, clock.slot_count())));
        }
    }
    Ok(())
}

fn encode(stamps: &[Stamp]) -> Vec<u8> {
    stamps.iter().flat_map(|stamp| [stamp.lsn.0.to_be_bytes(), stamp.xid.0.to_be_bytes()]).flatten().collect()
}

fn decode(bytes: &[u8]) -> Option<Vec<Stamp>> {
    let (pairs, rest) = bytes.as_chunks::<16>();
    let number = |half: &[u8]| half.try_into().map(u64::from_be_bytes).ok();
    let stamp = |pair: &[u8; 16]| Some(Stamp { lsn: Lsn(number(&pair[..8])?), xid: Xid(number(&pair[8..])?) });
    rest.is_empty().then(|| pairs.iter().map(stamp).collect::<Option<Vec<_>>>())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { system_identifier: "1".into(), timeline: 1, flushed: Lsn(1_000) }
    }

    fn check(slot: SlotState, state: Option<State>, sentinel: Option<Sentinel>, running: Option<Standing>) -> Standing {
        let clock = TagClock::new(16, Floor(0));
        let facts = Attaching {
            slot_name: "walcast",
            slot: &slot,
            identity: &identity(),
            rules: "",
            running: running.as_ref(),
            fresh_epoch: Epoch(9),
        };
        decide(&facts, &clock, state.as_ref(), sentinel.as_ref())
    }

    fn state() -> State {
        State { epoch: Epoch(5), system_identifier: "1".into(), timeline: 1, slot: "walcast".into(), floor: Floor(3) }
    }

    fn sentinel(covered: u64) -> Sentinel {
        Sentinel {
            epoch: Epoch(5),
            floor: Floor(3),
            covered: Lsn(covered),
            hash_version: TagHash::VERSION,
            slots: 16,
            same_rules: true,
        }
    }

    fn found(acknowledged: u64) -> SlotState {
        SlotState::Found { acknowledged: Lsn(acknowledged) }
    }

    #[test]
    fn a_clean_restart_keeps_epoch_and_floor() {
        let standing = check(found(100), Some(state()), Some(sentinel(120)), None);
        assert_eq!(standing, Standing { epoch: Epoch(5), floor: Floor(3), covered: Lsn(120), moved: None });
    }

    #[test]
    fn a_new_slot_another_cluster_or_a_promotion_begin_a_new_epoch() {
        let promoted = State { timeline: 2, ..state() };
        let other = State { system_identifier: "2".into(), ..state() };
        for standing in [
            check(SlotState::Created { at: Lsn(1) }, Some(state()), Some(sentinel(1)), None),
            check(found(1), None, None, None),
            check(found(1), Some(promoted), Some(sentinel(1)), None),
            check(found(1), Some(other), Some(sentinel(1)), None),
        ] {
            assert_eq!(standing.epoch, Epoch(9));
            assert!(standing.moved.is_some());
        }
    }

    #[test]
    fn p5_crash_recovery_and_an_old_checkpoint_move_the_floor_only() {
        let old_form = Sentinel { hash_version: 0, ..sentinel(200) };
        let lived = Standing { epoch: Epoch(5), floor: Floor(7), covered: Lsn(50), moved: None };
        for (standing, floor) in [
            (check(found(100), Some(state()), None, None), 4),
            (check(found(100), Some(state()), Some(sentinel(99)), None), 4),
            (check(found(100), Some(state()), Some(old_form), None), 4),
            (check(found(100), Some(state()), Some(Sentinel { same_rules: false, ..sentinel(200) }), None), 4),
            (check(found(100), Some(state()), None, Some(lived)), 8),
        ] {
            assert_eq!(standing.epoch, Epoch(5));
            assert_eq!(standing.floor, Floor(floor));
            assert!(standing.moved.is_some());
        }
    }

    #[test]
    fn stamps_read_as_written() {
        let stamps = vec![Stamp { lsn: Lsn(1), xid: Xid(2) }, Stamp::unseen(Lsn(u64::MAX))];
        assert_eq!(decode(&encode(&stamps)), Some(stamps));
        assert_eq!(decode(&[0; 15]), None);
    }
}
