//! Compares what a client heard with PostgreSQL's own account of the log, read by SQL from a slot that Walcast knows
//! nothing of, through a decoder that is not ours. Never forgives: one event too few, too many, out of place or altered fails.

use anyhow::{Context, Result, bail};
use tokio_postgres::Client;
use walcast_engine::model::{Lsn, Position};

pub const SLOT: &str = "judge";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub operation: String,
    pub table: String,
    pub key: i64,
    /// Of the new row, or of the old one where a DELETE logs it.
    pub value: Option<i64>,
}

/// A change as the log has it.
#[derive(Debug, Clone)]
pub struct Logged {
    pub event: Event,
    pub index: u32,
    /// The commit record lies in between.
    pub begin: Lsn,
    pub end: Lsn,
}

/// A change as a client heard it.
#[derive(Debug, Clone)]
pub struct Heard {
    pub event: Event,
    pub position: Position,
}

pub async fn watch_log(client: &Client) -> Result<()> {
    client.execute("select pg_create_logical_replication_slot($1, 'test_decoding')", &[&SLOT]).await?;
    Ok(())
}

/// Every change of schema `public` since [`watch_log`], in commit order.
pub async fn read_log(client: &Client) -> Result<Vec<Logged>> {
    let sql =
        "select lsn::text, data from pg_logical_slot_peek_changes($1, null, null, 'include-xids', '0', 'skip-empty-xacts', '1')";
    let (mut log, mut open, mut begin): (Vec<Logged>, Vec<Event>, Lsn) = Default::default();
    for row in client.query(sql, &[&SLOT]).await? {
        let (lsn, text): (&str, &str) = (row.get(0), row.get(1));
        if text == "BEGIN" {
            open.clear();
        } else if text == "COMMIT" {
            // A commit is reported at its end; the one before it ended at `begin`.
            let end: Lsn = lsn.parse()?;
            log.extend(open.drain(..).enumerate().map(|(index, event)| Logged { event, index: index as u32, begin, end }));
            begin = end;
        } else if let Some(change) = text.strip_prefix("table public.") {
            open.push(parse(change).with_context(|| format!("the log says: {text}"))?);
        }
    }
    Ok(log)
}

/// `visits: UPDATE: old-key: id[bigint]:1 value[bigint]:2 new-tuple: id[bigint]:1 value[bigint]:3`
fn parse(change: &str) -> Option<Event> {
    let (table, rest) = change.split_once(": ")?;
    let (operation, row) = rest.split_once(": ")?;
    let row = row.split_once("new-tuple: ").map_or(row, |(_, new)| new);
    let cell = |name: &str| row.split(' ').find_map(|cell| cell.strip_prefix(name)?.strip_prefix("[bigint]:")?.parse().ok());
    Some(Event { operation: operation.to_owned(), table: table.to_owned(), key: cell("id")?, value: cell("value") })
}

/// Each change of the log, once, in its order and at its position, and nothing else.
pub fn judge(log: &[Logged], heard: &[Heard]) -> Result<()> {
    for (at, (logged, heard_here)) in log.iter().zip(heard).enumerate() {
        if at > 0 && heard[at - 1].position.epoch != heard_here.position.epoch {
            bail!("event {at}: the epoch changed without a resync");
        }
        if at > 0 && heard[at - 1].position.place() >= heard_here.position.place() {
            bail!("event {at}: {} came after {}: repeated or out of order", heard_here.position, heard[at - 1].position);
        }
        if logged.event != heard_here.event {
            let known = log[at..].iter().position(|later| later.event == heard_here.event);
            let what =
                known.map_or("it is not in the log from there on".to_owned(), |count| format!("{count} changes were lost"));
            bail!(
                "event {at}: the log has {:?}, heard was {:?} at {}: {what}",
                logged.event,
                heard_here.event,
                heard_here.position
            );
        }
        let Position { lsn, index, .. } = heard_here.position;
        if index != logged.index || lsn < logged.begin || lsn >= logged.end {
            bail!(
                "event {at}: its position {} is not that of the log, {}..{} index {}",
                heard_here.position,
                logged.begin,
                logged.end,
                logged.index
            );
        }
    }
    if log.len() != heard.len() {
        bail!("the log has {} changes, heard were {}", log.len(), heard.len());
    }
    Ok(())
}

/// Ten commits of three changes each, and who heard them all.
fn example() -> (Vec<Logged>, Vec<Heard>) {
    let place = |n: u64| (Lsn(100 * (n / 3)), (n % 3) as u32);
    let event = |n: u64| Event { operation: "INSERT".into(), table: "visits".into(), key: n as i64, value: Some(1) };
    let logged = |n| Logged { event: event(n), index: place(n).1, begin: place(n).0, end: Lsn(place(n).0.0 + 100) };
    let heard = |n| Heard {
        event: event(n),
        position: Position { lsn: Lsn(place(n).0.0 + 60), index: place(n).1, ..Position::default() },
    };
    ((0..30).map(logged).collect(), (0..30).map(heard).collect())
}

#[test]
fn the_judge_accepts_the_whole_truth_and_nothing_else() {
    let (log, truth) = example();
    judge(&log, &truth).unwrap();
    let broken = |what: &str, spoil: &dyn Fn(&mut Vec<Heard>)| {
        let mut heard = truth.clone();
        spoil(&mut heard);
        assert!(judge(&log, &heard).is_err(), "{what} went unnoticed");
    };
    broken("a lost event", &|heard| drop(heard.remove(17)));
    broken("a lost end", &|heard| drop(heard.pop()));
    broken("a lost beginning", &|heard| drop(heard.remove(0)));
    broken("a repeated event", &|heard| heard.insert(17, heard[16].clone()));
    broken("a repeated stretch", &|heard| drop(heard.splice(20..20, truth[10..20].to_vec())));
    broken("two events in another order", &|heard| heard.swap(16, 17));
    broken("another value", &|heard| heard[17].event.value = Some(2));
    broken("another operation", &|heard| heard[17].event.operation = "UPDATE".into());
    broken("another index", &|heard| heard[17].position.index += 1);
    broken("another commit's position", &|heard| heard[17].position.lsn = Lsn(heard[17].position.lsn.0 + 60));
    broken("a new epoch", &|heard| heard[17].position.epoch.0 += 1);
}
