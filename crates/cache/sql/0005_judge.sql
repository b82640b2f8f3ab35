-- How SQL judges a row of the second tier: by the checkpoint of the tag clock, as Walcast itself judges it by the clock.
-- The checkpoint is about a second old. So what SQL reads is of bounded staleness, and no more than that.

-- The small ones have a body that is bound when it is made and no search path of their own, so that PostgreSQL
-- writes them into the statement that calls them; the others are in PL/pgSQL, which keeps its plans for the session.

-- Finds a row; its full key decides.
create or replace function walcast.cache_hash(namespace text, key text) returns bytea
language sql immutable parallel safe
return int8send(hashtextextended(($1 || '/' || $2) collate "C", 1)) || int8send(hashtextextended(($1 || '/' || $2) collate "C", 2));

-- The hash's slot in a clock of so many: the high 64 bits of their product.
create or replace function walcast.clock_slot(hash bigint, slots int) returns int
language sql immutable parallel safe
return ((((hash >> 32) & 4294967295) * slots + (((hash & 4294967295) * slots) >> 32)) >> 32)::int;

-- The number in eight bytes.
create or replace function walcast.clock_number(bytes bytea, at int) returns bigint
language sql immutable parallel safe
return ('x' || encode(substr(bytes, at, 8), 'hex'))::bit(64)::bigint;

-- What an entry with this tag falls with too: `patients:id=7` with `patients:id=*`, `product:7` with `product:*`.
create or replace function walcast.tag_companion(tag text) returns text
language sql immutable parallel safe
return case
  when starts_with(tag, '~') or strpos(tag, ':') = 0 then null
  when strpos(substr(tag, strpos(tag, ':') + 1), '=') = 0 then split_part(tag, ':', 1) || ':*'
  else split_part(tag, ':', 1) || ':' || split_part(substr(tag, strpos(tag, ':') + 1), '=', 1) || '=*'
end;

-- The clock that can be believed now. No row: nobody runs Walcast, or the checkpoint is too old, of another form, or from
-- before a crash; then nothing may be answered. Text hashes differ on a big-endian server and in another encoding.
create or replace function walcast.cache_standing()
returns table (epoch text, floor bigint, slots int, settled pg_lsn)
language sql stable
begin atomic
  select t.epoch, t.floor, s.slots, s.settled_lsn
  from walcast.state t
  join walcast.sentinel s on s.epoch = t.epoch and s.floor = t.floor
  cross join walcast.cache_settings c
  where s.hash_version = 2
    and s.updated_at between clock_timestamp() - c.max_staleness and clock_timestamp() + c.max_staleness
    and getdatabaseencoding() = 'UTF8' and hashtextextended('walcast' collate "C", 0) = 1669215614823279504;
end;

-- A pattern over keys (`*` any text, `?` any character) as LIKE reads it.
create or replace function walcast.glob_like(pattern text) returns text
language sql immutable parallel safe
return replace(replace(replace(replace(replace($1, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%'), '?', '_');

-- The rule: every commit on the value's tags is at or below `settled` or visible in `snapshot`; and so is every invalidation
-- by hand that selects it otherwise than by a tag.
create or replace function walcast.clock_admits(namespace text, key text, tags text[], settled pg_lsn, snapshot text, slots int) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  below bigint := split_part($5, ':', 1)::bigint;
  upto bigint := split_part($5, ':', 2)::bigint;
  running bigint[] := coalesce(string_to_array(nullif(split_part($5, ':', 3), ''), ',')::bigint[], '{}');
  after bigint := ($4 - '0/0'::pg_lsn)::bigint;
  -- What ends a value: everything, its namespace and key, its tags and their companions.
  ended_by text[] := array['~all', '~ns:' || $1, '~key:' || $1 || ':' || split_part($2, chr(31), 1)] || $3
    || array(select walcast.tag_companion(t) from unnest($3) t);
  places int[] := array(select walcast.clock_slot(hashtextextended(t collate "C", 0), $6) from unnest(ended_by) t where t is not null);
begin
  return not exists (
    select from walcast.clock c
    where c.slot_index = any (places)
      and (c.dropped > $4 or exists (
        select from generate_series(1, octet_length(c.stamps), 16) at,
          lateral (select walcast.clock_number(c.stamps, at), walcast.clock_number(c.stamps, at + 8)) stamp(lsn, xid)
        -- -1 is nobody's transaction: no snapshot sees it.
        where stamp.lsn > after
          and (stamp.xid < 0 or not (stamp.xid < below or (stamp.xid < upto and stamp.xid <> all (running)))))))
  and not exists (
    select from walcast.selections s, lateral (select s.xid::text::numeric) by_hand(number)
    where s.lsn > $4 and not (by_hand.number < below or (by_hand.number < upto and by_hand.number <> all (running)))
      and coalesce(s.content ->> 'namespace', $1) = $1
      and (s.content ->> 'pattern' is null or split_part($2, chr(31), 1) like walcast.glob_like(s.content ->> 'pattern'))
      and ended_by @> array(select jsonb_array_elements_text(s.content -> 'all_of'))
      and (s.content -> 'any_of' is null or ended_by && array(select jsonb_array_elements_text(s.content -> 'any_of'))));
end
$$;

-- The row, if it may be answered. No row else.
create or replace function walcast.cache_find(namespace text, key text) returns table (value bytea, content_type text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  e record;
begin
  -- Unlogged tables cannot be read on a standby. And a transaction that has written anything is to read what it wrote,
  -- of which no clock has heard: neither its rows nor what it invalidated.
  if pg_is_in_recovery() or pg_current_xact_id_if_assigned() is not null then
    return;
  end if;
  select c.*, s.slots into e
  from walcast.cache_entries c, walcast.cache_standing() s
  where c.hash = walcast.cache_hash($1, $2) and c.namespace = $1 and c.key = $2
    and c.epoch = s.epoch and c.floor = s.floor and c.expires_at > clock_timestamp() and not c.negative;
  if found and walcast.clock_admits($1, $2, e.tags, e.settled, e.snapshot, e.slots) then
    return query select e.value, e.content_type;
  end if;
end
$$;
