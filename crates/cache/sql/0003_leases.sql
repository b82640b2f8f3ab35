-- Who computes which key at present, where several Walcasts share the cache table (`cache.lease`). Unlogged: a lease is
-- over in seconds and says nothing about any value; without a row, or without the table, everybody computes.

create unlogged table if not exists walcast.cache_leases (
  hash bytea primary key,
  holder text not null,
  expires_at timestamptz not null
) with (
  -- Rows come and go all the time, and the table should stay a few pages.
  fillfactor = 50,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 500,
  autovacuum_vacuum_cost_delay = 0
);

revoke all on walcast.cache_leases from public;
