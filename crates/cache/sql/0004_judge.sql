-- How SQL judges a row of the second tier: by the checkpoint of the tag clock, as Walcast itself judges it by the clock.
-- The checkpoint is about a second old. So what SQL reads is of bounded staleness, and no more than that.

-- Finds a row; its full key decides.
create or replace function walcast.cache_hash(namespace text, key text) returns bytea
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select int8send(hashtextextended(($1 || '/' || $2) collate "C", 1)) || int8send(hashtextextended(($1 || '/' || $2) collate "C", 2))
$$;

-- The tag's slot in a clock of so many: the high 64 of the 96 to 128 bits of hash times slots.
create or replace function walcast.clock_slot(tag text, slots int) returns int
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select ((((h >> 32) & 4294967295) * $2 + (((h & 4294967295) * $2) >> 32)) >> 32)::int
  from (select hashtextextended($1 collate "C", 0)) hashed(h)
$$;

-- The clock that can be believed now. No row: nobody runs Walcast, or the checkpoint is too old, of another form, or from
-- before a crash; then nothing may be answered. Text hashes differ on a big-endian server and in another encoding.
create or replace function walcast.cache_standing()
returns table (epoch text, floor bigint, slots int, covered pg_lsn, settled pg_lsn)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select t.epoch, t.floor, s.slots, s.clock_lsn, s.settled_lsn
  from walcast.state t
  join walcast.sentinel s on s.epoch = t.epoch and s.floor = t.floor
  cross join walcast.cache_settings c
  where s.hash_version = 2
    and s.updated_at between clock_timestamp() - c.max_staleness and clock_timestamp() + c.max_staleness
    and getdatabaseencoding() = 'UTF8' and hashtextextended('walcast' collate "C", 0) = 1669215614823279504
$$;

-- Everything that ends a value: its tags, each with the unknown rows of its column, its key, its namespace, everything.
create or replace function walcast.cache_ended_by(namespace text, key text, tags text[]) returns text[]
language sql immutable parallel safe set search_path = pg_catalog, pg_temp as $$
  select array['~all', '~ns:' || $1, '~key:' || $1 || ':' || split_part($2, chr(31), 1)] || $3
    || array(select r.parts[1] || '*' from unnest($3) t(tag), regexp_match(t.tag, '^(?!~)([^:]*:[^=]*=)') r(parts) where r.parts is not null)
$$;

-- The rule: every commit on the value's tags is at or below `settled` or visible in `snapshot`.
create or replace function walcast.clock_admits(namespace text, key text, tags text[], settled pg_lsn, snapshot text, slots int) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select not exists (
    select from walcast.clock c
    cross join (select ($4 - '0/0'::pg_lsn)::bigint, split_part($5, ':', 1)::bigint, split_part($5, ':', 2)::bigint,
                       coalesce(string_to_array(nullif(split_part($5, ':', 3), ''), ',')::bigint[], '{}')) f(settled, xmin, xmax, running)
    where c.slot_index = any (array(select walcast.clock_slot(t.tag, $6) from unnest(walcast.cache_ended_by($1, $2, $3)) t(tag)))
      and (c.dropped > $4 or exists (
        select from generate_series(0, octet_length(c.stamps) / 16 - 1) at
        cross join lateral (select ('x' || encode(substr(c.stamps, at * 16 + 1, 8), 'hex'))::bit(64)::bigint,
                                   ('x' || encode(substr(c.stamps, at * 16 + 9, 8), 'hex'))::bit(64)::bigint) stamp(lsn, xid)
        -- -1 is nobody's transaction: no snapshot sees it.
        where stamp.lsn > f.settled
          and (stamp.xid < 0 or not (stamp.xid < f.xmin or (stamp.xid < f.xmax and stamp.xid <> all (f.running))))))
  )
$$;

-- The row, if it may be answered. No row else.
create or replace function walcast.cache_find(namespace text, key text) returns table (value bytea, content_type text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  -- Unlogged tables cannot be read on a standby. And a transaction that has written anything is to read what it wrote,
  -- of which no clock has heard: neither its rows nor what it invalidated.
  if pg_is_in_recovery() or pg_current_xact_id_if_assigned() is not null then
    return;
  end if;
  return query
    select e.value, e.content_type
    from walcast.cache_standing() s
    join walcast.cache_entries e on e.hash = walcast.cache_hash($1, $2)
    where e.namespace = $1 and e.key = $2 and e.epoch = s.epoch and e.floor = s.floor
      and e.expires_at > clock_timestamp()
      and walcast.clock_admits(e.namespace, e.key, e.tags, e.settled, e.snapshot, s.slots);
end
$$;
