-- The cache from SQL, inside the application's own transaction: what is set or invalidated holds exactly when it commits,
-- and a transaction that is rolled back has done nothing.
--
-- They act with their owner's rights, since no other role may touch the tables, and ask for the caller's at each call.

-- What a value is made from: epoch, floor, the place up to which all is settled, and the snapshot. Take it **first**, then
-- read, then hand it to cache_set. Stable, so that place and snapshot are of one moment: the place is read in the
-- very snapshot, which therefore is younger than the settling.
create or replace function walcast.cache_fence() returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  snapshot pg_snapshot := pg_current_snapshot();
  own xid8 := pg_current_xact_id_if_assigned();
  seen text := snapshot::text;
begin
  if pg_is_in_recovery() then
    return 'none';
  end if;
  -- A transaction's own id does not stand among the running ones, but what it goes on to write must not pass as seen.
  if own < pg_snapshot_xmax(snapshot) then
    seen := format('%s:%s:%s', least(own, pg_snapshot_xmin(snapshot)), pg_snapshot_xmax(snapshot),
      (select string_agg(x::text, ',' order by x) from (select pg_snapshot_xip(snapshot) union select own) running(x)));
  end if;
  return coalesce((select format('%s|%s|%s|%s', s.epoch, s.floor, s.settled, seen) from walcast.cache_standing() s), 'none');
end
$$;

-- The bytes under a key, if they may be answered; null else.
create or replace function walcast.cache_get_bytes(namespace text, key text) returns bytea
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform walcast.cache_require($1, 'read');
  perform walcast.cache_check_shared($1);
  perform walcast.cache_check_key($2);
  return (select f.value from walcast.cache_find($1, $2) f);
end
$$;

-- The JSON under a key, if it may be answered; null else, and for values that are no JSON.
--
-- Bounded staleness: a commit is known here about a second after it is known to Walcast. After cache.max_staleness without
-- Walcast nothing is answered. A transaction that has written anything is answered nothing: it reads the truth.
create or replace function walcast.cache_get(namespace text, key text) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  found_value bytea;
begin
  perform walcast.cache_require($1, 'read');
  perform walcast.cache_check_shared($1);
  perform walcast.cache_check_key($2);
  select f.value into found_value from walcast.cache_find($1, $2) f where f.content_type ~* '^application/([a-z0-9.-]+\+)?json *(;|$)';
  begin
    return convert_from(found_value, 'UTF8')::jsonb;
  exception when data_exception then
    return null; -- said to be JSON, and is none that jsonb can hold
  end;
end
$$;

-- A namespace that is kept per security context has no key that SQL could name. Values from elsewhere SQL neither reads nor
-- writes: the memory of Walcast holds them as well, and nothing would tell it that SQL put another value there.
create or replace function walcast.cache_check_shared(namespace text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  named record;
begin
  select * into named from walcast.cache_namespaces n where n.namespace = $1;
  if named.per_context then
    raise exception 'cache namespace "%" has an entry of its own for each security context', $1
      using errcode = 'feature_not_supported', hint = 'use walcast.cached(), which keeps security contexts apart, or /cache/v1';
  end if;
  if named.external then
    raise exception 'cache namespace "%" has source = "external": its values are put and read over HTTP alone', $1
      using errcode = 'feature_not_supported', hint = 'use /cache/v1; from SQL it can be invalidated';
  end if;
end
$$;

-- Stores a value whose key, namespace and tags have been checked. False if it may not be stored, or somebody else is at it.
create or replace function walcast.cache_store(namespace text, key text, value bytea, content_type text, ttl interval, tags text[], fence text)
returns boolean
-- Nobody waits for a cache: neither the application for us nor, for long, another transaction for the application's.
language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '100ms' as $$
declare
  parts text[] := regexp_match($7, '^([0-9a-f]{8})\|(\d{1,18})\|([0-9A-F]{1,8}/[0-9A-F]{1,8})\|(\d{1,18}:(\d{1,18}):[\d,]*)$');
  standing record;
  named record;
  all_tags text[];
  most bigint := (select s.max_value_bytes from walcast.cache_settings s);
  seen text;
  settled pg_lsn;
  ends timestamptz;
begin
  if octet_length($3) > most then
    raise exception 'a value has at most % bytes, not %', most, octet_length($3)
      using errcode = 'program_limit_exceeded', hint = 'split the value, or raise cache.max_value_bytes and run walcast migrate';
  end if;
  if pg_is_in_recovery() or current_setting('transaction_read_only')::boolean then
    return false;
  end if;
  select * into standing from walcast.cache_standing();
  select * into named from walcast.cache_namespaces n where n.namespace = $1;
  if standing.epoch is null or most is null then
    return false;
  end if;
  if $7 = 'none' then
    return false;
  elsif parts is null then
    raise exception 'this is no fence that this database gave: %', quote_literal(left($7, 80))
      using errcode = 'invalid_parameter_value', hint = 'hand on what walcast.cache_fence() answered, as it came';
  elsif (parts[1], parts[2]::bigint) <> (standing.epoch, standing.floor) then
    return false;
  -- Ahead of what is known here: Walcast has attached again since and has settled nothing yet, or the fence is younger than
  -- this transaction's snapshot. No fault of the caller's, but nobody could vouch for his value.
  elsif parts[5]::xid8 > pg_snapshot_xmax(pg_current_snapshot()) or parts[3]::pg_lsn > standing.settled then
    return false;
  else
    seen := parts[4];
    settled := parts[3]::pg_lsn;
  end if;
  all_tags := array(select t from unnest($6 || coalesce(named.tags, '{}')) t group by t order by t);
  -- This spares the table; safe is only the judgement at each read.
  if not walcast.clock_admits($1, $2, all_tags, settled, seen, standing.slots) then
    return false;
  end if;
  -- Until this transaction ends the row is its own. Another one gives way at once.
  if not pg_try_advisory_xact_lock(hashtextextended(('walcast/' || $1 || '/' || $2) collate "C", 3)) then
    return false;
  end if;
  ends := clock_timestamp() + coalesce($5, named.ttl, (select s.default_ttl from walcast.cache_settings s));
  insert into walcast.cache_entries as c
    (hash, namespace, key, value, content_type, tags, epoch, floor, settled, snapshot_xmax, snapshot, stored_at, expires_at, stale_until, negative, etag)
  values (walcast.cache_hash($1, $2), $1, $2, $3, $4, all_tags, standing.epoch, standing.floor, settled, split_part(seen, ':', 2)::bigint, seen,
    clock_timestamp(), ends, ends, false,
    '"' || encode(substr(sha256(convert_to($4, 'UTF8') || '\x00' || $3), 1, 16), 'hex') || '"')
  -- Never back: a row gives way only to a fence that is not older, or if it is of another epoch and so unreachable.
  on conflict (hash) do update set
    namespace = excluded.namespace, key = excluded.key, value = excluded.value, content_type = excluded.content_type,
    tags = excluded.tags, epoch = excluded.epoch, floor = excluded.floor, settled = excluded.settled, snapshot_xmax = excluded.snapshot_xmax,
    snapshot = excluded.snapshot, stored_at = excluded.stored_at, expires_at = excluded.expires_at, stale_until = excluded.stale_until,
    negative = excluded.negative, etag = excluded.etag
  where (excluded.floor, excluded.settled, excluded.snapshot_xmax) >= (c.floor, c.settled, c.snapshot_xmax) or excluded.epoch <> c.epoch;
  return found;
exception when lock_not_available or serialization_failure or insufficient_resources then
  -- Walcast is writing the row now, or wrote it after this transaction's snapshot; or there is no room.
  return false;
end
$$;

-- Stores a value for all who may read the namespace, from the moment of the commit. True if it is stored; false if it may not
-- be: nobody runs Walcast, a commit has touched its tags since the fence, a newer value is there or being written.
--
-- `fence` says what the value was made from: cache_fence(), taken before the first read. Under repeatable read and
-- serializable it may be left out, for then every read is of one snapshot. Under read committed it may not: earlier
-- statements of the transaction read from older snapshots than this one, and their value would be stale for ever.
create or replace function walcast.cache_set(
  namespace text, key text, value jsonb, ttl interval default null, tags text[] default '{}', fence text default null
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform walcast.cache_require($1, 'write');
  perform walcast.cache_check_shared($1);
  perform walcast.cache_check_key($2);
  perform walcast.cache_check_ttl($4);
  perform walcast.cache_check_tags($5, 64);
  if $3 is null then
    raise exception 'there is no value to store' using errcode = 'null_value_not_allowed', hint = '''null''::jsonb stores that there is none';
  end if;
  perform walcast.cache_check_tracked($5);
  if $6 is null and current_setting('transaction_isolation') not in ('repeatable read', 'serializable') then
    raise exception 'under read committed nobody knows what this value was made from'
      using errcode = 'object_not_in_prerequisite_state',
        hint = 'take walcast.cache_fence() before the first read and hand it on as fence, use walcast.cached(), or begin isolation level repeatable read';
  end if;
  return walcast.cache_store($1, $2, convert_to($3::text, 'UTF8'), 'application/json', $4, $5, coalesce($6, walcast.cache_fence()));
end
$$;

-- One message in the WAL, with the transaction's id and place like any commit.
create or replace function walcast.cache_raise(tags text[]) returns xid8
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_logical_emit_message(true, 'walcast',
    convert_to(jsonb_build_object('invalidate', jsonb_build_object('tags', $1, 'id', null))::text, 'UTF8'));
  return pg_current_xact_id();
end
$$;

-- Ends every entry that carries one of the tags, in whichever namespace, when this transaction commits. Answers its id,
-- which GET /cache and GET /query take as Walcast-At-Least.
create or replace function walcast.cache_invalidate_tags(tags text[]) returns xid8
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform walcast.cache_check_tags($1, 1000);
  if not walcast.cache_may('*', 'invalidate') then
    raise exception 'role "%" may not invalidate by tags, which reach into every cache namespace', walcast.cache_caller()
      using errcode = 'insufficient_privilege',
        hint = 'invalidate keys or a namespace, or let an administrator run: insert into walcast.namespace_grants (namespace, role, can_invalidate) values (''*'', …, true)';
  end if;
  return walcast.cache_raise($1);
end
$$;

-- The same for one key.
create or replace function walcast.cache_invalidate_key(namespace text, key text) returns xid8
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform walcast.cache_require($1, 'invalidate');
  perform walcast.cache_check_key($2);
  return walcast.cache_raise(array['~key:' || $1 || ':' || $2]);
end
$$;

-- The same for a whole namespace.
create or replace function walcast.cache_invalidate_namespace(namespace text) returns xid8
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform walcast.cache_require($1, 'invalidate');
  return walcast.cache_raise(array['~ns:' || $1]);
end
$$;
