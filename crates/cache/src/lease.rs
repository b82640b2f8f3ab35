//! One process computes a key, the others wait for its row: a short lease in `walcast.cache_leases`.
//!
//! Called by a leader who found nothing in any tier, if the config says `lease`. Only spares computations: with L2 away, a
//! holder that died or a lease that ran out, everybody computes. Nobody waits longer than half the time he has.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres::types::Type;
use walcast_model::CacheKey;
use walcast_pg::PgError;

use crate::{Answer, CacheConfig, L2, l2::Table, reader::Reader};

pub(crate) struct Leases {
    enabled: bool,
    /// This process.
    holder: String,
}

impl Leases {
    pub(crate) fn new(enabled: bool) -> Leases {
        Leases { enabled, holder: format!("{:032x}", rand::random::<u128>()) }
    }
}

pub(crate) enum Turn {
    /// Compute. With a lease, or without one where there is nobody to ask.
    Ours(Option<Lease>),
    /// Another process computed it.
    Answered(Box<Answer>),
}

/// Let go when dropped, after what was written before. If that fails it runs out by itself.
pub(crate) struct Lease {
    l2: L2,
    key: CacheKey,
    holder: String,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.l2.release(&self.key, &self.holder);
    }
}

const DOING: &str = "taking a lease on a cache key";
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// One statement. A dead standby must not stop the cache, hence the setting, which ends with the statement's transaction.
const TAKE: &str = "
with off as materialized (select set_config('synchronous_commit', 'off', true))
insert into walcast.cache_leases as l (hash, holder, expires_at)
select $1, $2, clock_timestamp() + $3 * interval '1 millisecond' from off
on conflict (hash) do update set holder = excluded.holder, expires_at = excluded.expires_at
where l.expires_at <= clock_timestamp() or l.holder = excluded.holder
returning 1";

/// Takes some that ran out along, so that the table stays small.
pub(crate) const RELEASE: &str = "
delete from walcast.cache_leases where hash = any (array(
  select hash from walcast.cache_leases
  where (hash = any($1) and holder = any($2)) or expires_at <= clock_timestamp() - interval '1 minute'
  order by hash limit 1000 for update skip locked))
returning 1";

impl Reader {
    pub(crate) async fn turn(&self) -> Turn {
        let leases = &self.cache.0.leases;
        let l2 = self.cache.l2_of(&self.key).filter(|_| leases.enabled && !self.cache.0.judge.is_lost());
        let Some(l2) = l2 else { return Turn::Ours(None) };
        let now = Instant::now();
        // The other half is for computing oneself: the holder may have died.
        let give_up = now + self.deadline.saturating_duration_since(now) / 2;
        let mut pause = FIRST_PAUSE;
        loop {
            match l2.table().take(&self.key, &leases.holder).await {
                Ok(true) => {
                    let lease = Lease { l2: l2.clone(), key: self.key.clone(), holder: leases.holder.clone() };
                    // The holder before us may have written the row between our look and our lease.
                    return match if pause == FIRST_PAUSE { None } else { self.ask_l2().await } {
                        Some(answer) => Turn::Answered(Box::new(answer)),
                        None => Turn::Ours(Some(lease)),
                    };
                }
                Ok(false) if Instant::now() + pause < give_up => {}
                Ok(false) | Err(Unasked) => return Turn::Ours(None),
            }
            if pause == FIRST_PAUSE {
                self.cache.0.stats.lease_waits.add(1);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            if let Some(answer) = self.ask_l2().await {
                return Turn::Answered(Box::new(answer));
            }
        }
    }
}

/// L2 is away, slow or spared. Counted where it happened.
struct Unasked;

impl Table {
    /// True if the lease is ours now.
    async fn take(&self, key: &CacheKey, holder: &str) -> Result<bool, Unasked> {
        let Some(leave) = self.breaker.ask(std::time::Instant::now()) else {
            self.stats.l2_skipped.add(1);
            return Err(Unasked);
        };
        match self.taken(key, holder, Instant::now() + self.config.read_timeout).await {
            Ok(taken) => {
                leave.succeeded();
                Ok(taken)
            }
            // No verdict: nobody asked the table.
            Err(PgError::Busy { .. }) => {
                self.stats.l2_skipped.add(1);
                Err(Unasked)
            }
            Err(error) => {
                self.stats.l2_errors.add(1);
                if leave.failed(std::time::Instant::now()) {
                    tracing::warn!(%error, "the cache's leases cannot be taken; going on without them");
                }
                Err(Unasked)
            }
        }
    }

    async fn taken(&self, key: &CacheKey, holder: &str, deadline: Instant) -> Result<bool, PgError> {
        let slow = || PgError::Away { doing: DOING, source: "no answer within `read_timeout`".into() };
        let (hash, length) = (key.digest(), CacheConfig::LEASE.as_millis() as i64);
        let hash = &hash[..];
        let connection = self.pool.lease_by(deadline, DOING).await?;
        let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
            [(&hash, Type::BYTEA), (&holder, Type::TEXT), (&length, Type::INT8)];
        match timeout_at(deadline, connection.query_typed(TAKE, &parameters)).await {
            Ok(rows) => rows.map(|rows| !rows.is_empty()).map_err(PgError::when(DOING)),
            Err(_) => {
                // The next borrower would wait behind our answer.
                connection.discard();
                Err(slow())
            }
        }
    }
}
