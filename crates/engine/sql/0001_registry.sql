-- Who is connected and subscribed, for SQL: a mirror that every running Walcast writes of its own memory, in batches, a second
-- or two behind. Unlogged, never published, and nothing is decided by it: whoever empties it loses nothing.

-- The processes that mirror here. A row that is gone tells its process that a crash has emptied the tables.
create unlogged table if not exists walcast.registry_instances (
  instance text primary key,
  slot text not null,
  started_at timestamptz not null default now(),
  beat_at timestamptz not null default now()
);

create unlogged table if not exists walcast.subscription_registry (
  instance text not null,
  id bigint not null,
  connection_id bigint not null,
  kind text not null,
  app text,
  component text,
  tenant text,
  role text not null,
  subject text,
  peer inet not null,
  topic text not null,
  bindings jsonb not null,
  since timestamptz not null,
  last_heartbeat timestamptz not null,
  delivered bigint not null,
  dropped bigint not null,
  outbox_bytes bigint not null,
  outbox_frames integer not null,
  round_trip interval,
  errors bigint not null,
  leak text,
  written_at timestamptz not null default now(),
  primary key (instance, id)
) with (
  -- Rows are written over again and again.
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0,
  autovacuum_vacuum_threshold = 5000,
  autovacuum_vacuum_cost_delay = 0
);

create or replace view walcast.subscription_health with (security_barrier) as
select
  case when s.stale then 'stale' when s.slow then 'slow' when s.leak is not null then 'leaking' else 'healthy' end as state,
  case
    when s.stale then format('nothing was heard for %s s', extract(epoch from now() - s.last_heartbeat)::bigint)
    when s.slow and s.outbox_bytes > 0 then format('%s bytes wait for its socket, %s were dropped', s.outbox_bytes, s.dropped)
    when s.slow then format('%s changes were dropped', s.dropped)
    when s.leak = 'growing' then 'the subscriptions of this component only become more: is every channel removed when its component goes?'
    when s.leak = 'duplicate' then 'this connection has the same subscription more than once: share one channel'
    when s.leak = 'unheard' then 'this topic has no bindings and was never sent anything: is it still needed?'
  end as reason,
  s.app, s.component, s.tenant, s.topic, s.bindings, s.kind, s.role, s.subject, s.peer,
  now() - s.since as age,
  s.last_heartbeat, s.delivered, s.dropped, s.outbox_bytes, s.outbox_frames, s.round_trip, s.errors,
  s.instance, s.connection_id, s.id
from (
  select r.*,
    -- The mirror tells a heartbeat at most half a minute late.
    r.last_heartbeat < now() - interval '5 minutes' as stale,
    r.outbox_bytes >= 262144 or r.dropped > 0 as slow
  from walcast.subscription_registry r
) s;

revoke all on walcast.registry_instances, walcast.subscription_registry, walcast.subscription_health from public;
grant usage on schema walcast to service_role;
grant select on walcast.subscription_registry, walcast.subscription_health to service_role;
