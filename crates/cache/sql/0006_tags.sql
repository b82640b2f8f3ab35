-- Tags, keys and lives as they are checked at the HTTP door, with the same outcome.

create or replace function walcast.cache_check_key(key text) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if $1 is null or $1 = '' or char_length($1) > 512 or ($1 collate "C") ~ '[\u0001-\u001f\u007f-\u009f\u2028\u2029]' then
    raise exception 'a cache key has 1 to 512 characters that can be printed, not %', coalesce(quote_literal(left($1, 40)), 'null')
      using errcode = 'invalid_parameter_value', hint = 'hash what is longer, and percent-encode what cannot be printed';
  end if;
end
$$;

create or replace function walcast.cache_check_ttl(ttl interval) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if not coalesce($1 between '1 second' and '30 days', true) then
    raise exception 'a ttl is between 1 second and 30 days, not %', $1
      using errcode = 'invalid_parameter_value', hint = 'leave it out for what the namespace says';
  end if;
end
$$;

-- The form of a tag that an application writes.
create or replace function walcast.cache_check_tags(tags text[], most int) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  tag text;
begin
  if $1 is null or coalesce(array_ndims($1), 1) <> 1 or cardinality($1) > $2 then
    raise exception 'tags are one list of at most %, not %', $2, coalesce(cardinality($1)::text, 'null')
      using errcode = 'invalid_parameter_value', hint = 'as in array[''patients:id=7'', ''reports'']; a table''s own tag stands for all its rows';
  end if;
  foreach tag in array $1 loop
    if tag is null or tag = '' or octet_length(tag) > 256 or starts_with(tag, '~') or (tag collate "C") ~ '[\u0001-\u001f\u007f-\u009f,]'
      or (tag collate "C") ~ '^[ \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]|[ \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]$'
    then
      raise exception 'tag % is not 1 to 256 bytes without comma, control characters, spaces around it and "~" before it',
        coalesce(quote_literal(left(tag, 40)), 'null')
        using errcode = 'invalid_parameter_value', hint = 'percent-encode what is not allowed';
    end if;
  end loop;
end
$$;

-- A part of a table's tag as the catalog spells it. Null if nothing can be spelled so.
create or replace function walcast.tag_unescape(part text) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if strpos($1, '%') = 0 then
    return $1;
  end if;
  return (
    select convert_from(decode(string_agg(
      case when m[1] ~ '^%' then rpad(substr(m[1], 2), 2, 'z') else encode(convert_to(m[1], 'UTF8'), 'hex') end, '' order by n), 'hex'), 'UTF8')
    from regexp_matches($1, '(%..|.)', 'g') with ordinality matched(m, n));
exception when data_exception then
  return null;
end
$$;

-- What would be read as syntax, percent-encoded.
create or replace function walcast.tag_escape(part text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select string_agg(case when (m[1] collate "C") ~ '[%,:=*~. \u0001-\u001f\u007f-\u009f]'
    then upper(regexp_replace(encode(convert_to(m[1], 'UTF8'), 'hex'), '(..)', '%\1', 'g')) else m[1] end, '' order by n)
  from regexp_matches($1, '.', 'g') with ordinality matched(m, n)
$$;

-- A tag that looks like a table's must be one that commits raise, spelled as they spell it, or the value would never fall.
create or replace function walcast.cache_check_tracked(tags text[]) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  tag text;
  names text[];
  is_row boolean;
  spelled text;
  relation oid;
  attribute text;
  item text;
  type_name text;
  why text;
begin
  foreach tag in array $1 loop
    if tag ~ '[:=]\*$' then
      raise exception 'tag "%" is raised only where a value is not known', tag
        using errcode = 'invalid_parameter_value', hint = 'use the table''s own tag, or a tag with the value';
    end if;
    names := regexp_match(tag, '^([^:]*):([^=]*)=(.*)$');
    is_row := names is not null;
    spelled := case when is_row then names[1] else tag end;
    if strpos(spelled, '.') > 0 then
      select c.oid into relation from pg_class c join pg_namespace n on n.oid = c.relnamespace
      where n.nspname = walcast.tag_unescape(split_part(spelled, '.', 1))
        and c.relname = walcast.tag_unescape(substr(spelled, strpos(spelled, '.') + 1)) and c.relkind in ('r', 'p', 'v', 'm', 'f');
    else
      select c.oid into relation from pg_class c
      where c.relnamespace = to_regnamespace('public') and c.relname = walcast.tag_unescape(spelled) and c.relkind in ('r', 'p', 'v', 'm', 'f');
    end if;
    attribute := walcast.tag_unescape(names[2]);
    item := walcast.tag_unescape(names[3]);
    -- No such table: a tag of the application's own.
    continue when relation is null or (is_row and (attribute is null or item is null));
    why := null;
    if not exists (
      select from pg_publication_tables p join pg_class c on c.oid = relation join pg_namespace n on n.oid = c.relnamespace
      join walcast.cache_settings s on s.publication = p.pubname
      where p.schemaname = n.nspname and p.tablename = c.relname
    ) then
      why := 'the table is not in the cache''s publication; walcast migrate adds it';
    else
      -- One spelling: what another would hash to, nobody raises.
      select case when n.nspname = 'public' then '' else walcast.tag_escape(n.nspname) || '.' end || walcast.tag_escape(c.relname)
      into spelled from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = relation;
      if is_row then
        -- The columns that carry row tags: in a key, an index or a foreign key, and of a type whose text is its value.
        select t.typname into type_name
        from pg_attribute a join pg_type t on t.oid = a.atttypid left join pg_collation co on co.oid = a.attcollation
        where a.attrelid = relation and a.attname = attribute and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
          and t.typname in ('bool', 'int2', 'int4', 'int8', 'uuid', 'text', 'varchar') and coalesce(co.collisdeterministic, true)
          and (exists (select from pg_index i where i.indrelid = relation and a.attnum = any (i.indkey::int2[]))
            or exists (select from pg_constraint f where f.conrelid = relation and f.contype = 'f' and a.attnum = any (f.conkey)));
        if type_name is null then
          why := 'the column is in no key, index or foreign key, or its type cannot be compared by text; use the table''s tag';
        elsif octet_length(item) > 64
          or (type_name in ('int2', 'int4', 'int8') and item !~ '^(0|-?[1-9][0-9]{0,18})$')
          or (type_name = 'bool' and item not in ('t', 'f'))
          or (type_name = 'uuid' and item !~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$') then
          why := format('no commit spells a value of type %s so', type_name);
        end if;
        spelled := spelled || ':' || walcast.tag_escape(attribute) || '=' || coalesce(walcast.tag_escape(item), '');
      end if;
      if why is null and spelled is distinct from tag then
        why := format('commits spell it %s', spelled);
      end if;
    end if;
    if why is not null then
      raise exception 'tag "%" is not raised by commits: %', tag, why
        using errcode = 'invalid_parameter_value', hint = 'use the table''s own tag, index the column, or publish the table';
    end if;
  end loop;
end
$$;
