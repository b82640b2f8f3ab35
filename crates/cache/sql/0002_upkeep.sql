-- What upkeep needs: how long a row may be answered marked stale, whether it says "there is nothing", when it was last
-- of use; and a log of what was cleaned up. A cache may forget: emptying it costs less than rewriting it.

truncate walcast.cache_entries;

alter table walcast.cache_entries
  add column if not exists stale_until timestamptz not null,
  add column if not exists negative boolean not null default false,
  -- Brought in batches, as hits are: a read never writes.
  add column if not exists last_hit_at timestamptz;

-- A row is over when it may not even be answered as stale.
drop index if exists walcast.cache_entries_expires_at;
create index if not exists cache_entries_stale_until on walcast.cache_entries (stale_until);

create table if not exists walcast.cache_cleanups (
  id bigint generated always as identity primary key,
  started_at timestamptz not null default now(),
  -- expired: its time was over. unused: long there and never asked for. low_value: the table came near its limit.
  -- room: it was past its limit.
  reason text not null,
  rows bigint not null,
  bytes bigint not null,
  duration_ms bigint not null
);

create index if not exists cache_cleanups_started_at on walcast.cache_cleanups (started_at);

create or replace view walcast.cache_cleanup_days as
select (started_at at time zone 'UTC')::date as day, reason, count(*) as runs, sum(rows)::bigint as rows,
       sum(bytes)::bigint as bytes, sum(duration_ms)::bigint as duration_ms, max(duration_ms) as longest_ms
from walcast.cache_cleanups group by 1, 2;

revoke all on walcast.cache_cleanups, walcast.cache_cleanup_days from public;
