-- The second tier of the cache. Unlogged: a value costs no WAL and the table is empty after crash recovery,
-- which is right, for then no older value may be answered anyway. Never published. Read by Walcast only:
-- whether a row may be answered says the tag clock in Walcast's memory, never the row itself.

create unlogged table if not exists walcast.cache_entries (
  hash bytea primary key,
  namespace text not null,
  key text not null,
  value bytea not null,
  content_type text not null,
  tags text[] not null,
  -- What the value was read from.
  epoch text not null,
  floor bigint not null,
  settled pg_lsn not null,
  snapshot_xmax bigint not null,
  snapshot text not null,
  stored_at timestamptz not null,
  expires_at timestamptz not null,
  etag text not null,
  hits bigint not null default 0
) with (
  -- Rows are replaced and expire all the time: vacuum often and a little, and leave room on the page.
  fillfactor = 80,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_vacuum_threshold = 1000,
  autovacuum_vacuum_cost_delay = 0,
  autovacuum_analyze_scale_factor = 0.2,
  toast.autovacuum_vacuum_scale_factor = 0.02,
  toast.autovacuum_vacuum_threshold = 1000,
  toast.autovacuum_vacuum_cost_delay = 0
);

create index if not exists cache_entries_expires_at on walcast.cache_entries (expires_at);

revoke all on walcast.cache_entries from public;
