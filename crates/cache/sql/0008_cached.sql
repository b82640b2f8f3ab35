-- walcast.cached(): the result of a function, kept for whoever asks the same in the same security context.

-- Settings that tell kept results apart, whoever calls: how values are printed, and single claims.
create or replace function walcast.cached_settings() returns text[]
language sql immutable parallel safe
return array['request.jwt.claim', 'request.jwt.claim.sub', 'request.jwt.claim.role', 'request.jwt.claim.email',
  'TimeZone', 'DateStyle', 'IntervalStyle', 'bytea_output', 'extra_float_digits', 'xmlbinary', 'lc_monetary', 'lc_numeric', 'lc_time',
  'default_text_search_config', 'row_security'];

-- Whose answer it is, and everything that a function may read of its surroundings: role, login, claims without the token's
-- own times and id, how values are printed, the search path, and the settings that the caller names.
create or replace function walcast.cached_context(vary text[], path text) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  claims text := current_setting('request.jwt.claims', true);
  setting text;
  parts text[];
begin
  begin
    claims := (claims::jsonb - array['exp', 'iat', 'nbf', 'jti'])::text;
  exception when others then
    null; -- no JSON object: as it stands
  end;
  parts := array[walcast.cache_caller(), session_user::text, claims, $2];
  foreach setting in array walcast.cached_settings() || array(select distinct v from unnest($1) v order by v)
  loop
    -- Names too, so that no list of values can pass for another.
    parts := parts || setting || current_setting(setting, true);
  end loop;
  return encode(substr(sha256(convert_to(to_jsonb(parts)::text, 'UTF8')), 1, 16), 'hex');
end
$$;

-- The separator cannot be part of a key that anybody names: neither cache_get nor GET /cache reaches these entries.
create or replace function walcast.cached_key("function" oid, args jsonb, vary text[], path text) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return left(regexp_replace($1::regprocedure::text, '[^a-zA-Z0-9_.,()" -]', '?', 'g'), 200) || '#' || $1::text || ':'
    || encode(sha256(convert_to($2::text, 'UTF8')), 'hex') || chr(31) || walcast.cached_context($3, $4);
end
$$;

-- Is the word in the text?
create or replace function walcast.names(body text, word text) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case when strpos($1, $2) > 0 then $1 ~ ('\m' || regexp_replace($2, '([^a-zA-Z0-9_])', '\\\1', 'g') || '\M') else false end
$$;

-- A setting that the function may read and the key does not have: in doubt nobody shares. Null where it is read by a name that
-- is not written out. Looks at policies, at views, at the function, at what is named in them and at what is called without
-- being named, as text: a net, no proof.
create or replace function walcast.cached_unkeyed("function" oid, vary text[]) returns table (reader text, setting text)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with recursive
  policies as (
    select format('policy %s on %s', p.polname, p.polrelid::regclass) as reader,
      coalesce(pg_get_expr(p.polqual, p.polrelid), '') || ' ' || coalesce(pg_get_expr(p.polwithcheck, p.polrelid), '') as body
    from pg_policy p
  ),
  views as (
    -- 2077 and 3294 are current_setting: only those views are worth a look.
    select format('view %s', r.ev_class::regclass) as reader, pg_get_viewdef(r.ev_class) as body
    from pg_rewrite r where r.ev_class >= 16384 and r.ev_type = '1' and r.ev_action::text ~ ':funcid (2077|3294) '
  ),
  functions as (
    select p.oid, p.proname::text as name, format('function %s', p.oid::regprocedure) as reader,
      concat_ws(' ', p.prosrc, pg_get_function_sqlbody(p.oid), pg_get_expr(p.proargdefaults, 0)) as body
    from pg_proc p where p.oid >= 16384 and p.prokind = 'f' and p.pronamespace <> 'walcast'::regnamespace
  ),
  -- What views, operators, casts and aggregates call: where they are used its name does not stand.
  unnamed as (
    select d.refobjid as oid from pg_depend d
    where d.refclassid = 'pg_proc'::regclass
      and d.classid in ('pg_rewrite'::regclass, 'pg_operator'::regclass, 'pg_cast'::regclass, 'pg_proc'::regclass)
  ),
  reached as (
    select f.oid, f.reader, f.body from functions f
    where f.oid = $1 or f.oid in (select u.oid from unnamed u) or exists (select from policies p where walcast.names(p.body, f.name))
    union
    select f.oid, f.reader, f.body from reached r join functions f on walcast.names(r.body, f.name)
  ),
  bodies as (
    select * from policies union all select * from views union all select r.reader, r.body from reached r
  ),
  -- A call that is read for sure: the name, one plain literal, and nothing that would make another name of it.
  written(form) as (values ('\mcurrent_setting\s*\(\s*''([^''\\]+)''\s*(?:::\s*text\s*)?[,)]'))
  select s.reader, lower(m[1])
  from bodies s, written w, regexp_matches(s.body, w.form, 'gi') m
  where lower(m[1]) <> all (
      array['request.jwt.claims', 'role', 'search_path', 'session_authorization']
        || array(select lower(v) from unnest(walcast.cached_settings() || $2) v))
    -- The same for every session of the server.
    and not exists (
      select from pg_settings g where lower(g.name) = lower(m[1]) and g.context in ('internal', 'postmaster', 'sighup'))
  union all
  select s.reader, null
  from bodies s, written w
  where regexp_replace(s.body, w.form, ' ', 'gi') ~* '\m(current_setting|pg_settings|pg_show_all_settings)\M'
$$;

-- The kept result; null if there is none to be had. Checks every argument and right of cached().
create or replace function walcast.cached_find(
  "function" regprocedure, args jsonb, ttl interval, tags text[], namespace text, vary text[], path text
) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  kept bytea;
  unkeyed record;
begin
  perform walcast.cache_require($5, 'read');
  perform walcast.cache_require($5, 'write');
  if exists (select from walcast.cache_namespaces n where n.namespace = $5 and n.external) then
    perform walcast.cache_check_shared($5);
  end if;
  perform walcast.cache_check_ttl($3);
  perform walcast.cache_check_tags($4, 63);
  if $6 is null or array_position($6, null) is not null then
    raise exception 'vary is a list of settings without nulls' using errcode = 'invalid_parameter_value', hint = 'as in array[''app.tenant'']';
  end if;
  if not coalesce(has_function_privilege(walcast.cache_caller()::name, $1, 'execute'), false) then
    raise exception 'role "%" may not execute %', walcast.cache_caller(), coalesce($1::text, 'null')
      using errcode = 'insufficient_privilege', hint = format('grant execute on function %s to %I', $1, walcast.cache_caller());
  end if;
  select f.value into kept from walcast.cache_find($5, walcast.cached_key($1, $2, $6, $7)) f;
  -- What is kept has passed the rest.
  if kept is null then
    perform walcast.cache_check_tracked($4);
  end if;
  if kept is null and pg_current_xact_id_if_assigned() is null then
    select * into unkeyed from walcast.cached_unkeyed($1, $6) limit 1;
    if unkeyed.setting is not null then
      raise exception '% reads the setting %, which does not tell the kept results of % apart', unkeyed.reader, unkeyed.setting, $1
        using errcode = 'object_not_in_prerequisite_state', hint = format('pass vary => array[%L]', unkeyed.setting);
    elsif unkeyed.reader is not null then
      raise exception '% reads a setting whose name is not written out, so nobody knows whether it tells the kept results of % apart',
        unkeyed.reader, $1
        using errcode = 'object_not_in_prerequisite_state', hint = 'write its name as one plain literal: current_setting(''app.tenant'', true)';
    end if;
  end if;
  return convert_from(kept, 'UTF8')::jsonb;
end
$$;

create or replace function walcast.cached_keep(
  "function" regprocedure, args jsonb, ttl interval, tags text[], namespace text, vary text[], path text, value jsonb, fence text
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform walcast.cache_require($5, 'write');
  perform walcast.cache_check_ttl($3);
  perform walcast.cache_check_tags($4, 63);
  if octet_length($8::text) > (select s.max_value_bytes from walcast.cache_settings s) then
    return false;
  end if;
  -- `~rules`: falls when policies, privileges, roles or functions change.
  return walcast.cache_store($5, walcast.cached_key($1, $2, $6, $7), convert_to($8::text, 'UTF8'), 'application/json', $3, $4 || '~rules'::text, $9);
exception when others then
  -- The caller has his result. That it could not be kept is no reason to take it from him.
  raise warning 'walcast.cached() could not keep a result: %', sqlerrm;
  return false;
end
$$;

-- The statement that calls the function with the JSON list $1, each element turned into the declared type by PostgreSQL:
-- neither values nor names of the request ever become part of it.
create or replace function walcast.cached_call("function" regprocedure, args jsonb) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  f record;
  why text;
begin
  select p.*, n.nspname, t.typtype as returns, coalesce((select bool_or(a.typtype = 'p') from unnest(p.proargtypes) u join pg_type a on a.oid = u), false) as polymorphic
  into f from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_type t on t.oid = p.prorettype where p.oid = $1;
  why := case
    when f.oid is null then 'does not exist'
    when f.prokind <> 'f' then 'is a procedure, an aggregate or a window function'
    when f.proretset then 'returns a set of rows; let it return jsonb_agg of them'
    when f.provariadic <> 0 or f.polymorphic then 'takes arguments of no declared type'
    when f.returns = 'p' and f.prorettype <> 'record'::regtype then 'returns nothing that could be kept'
    when jsonb_typeof($2) is distinct from 'array' then 'takes its arguments as one JSON list, as in ''[7, "text"]'''
    when jsonb_array_length($2) <> f.pronargs then format('takes %s arguments, not %s', f.pronargs, jsonb_array_length($2))
  end;
  if why is not null then
    raise exception 'function % %', coalesce($1::text, 'null'), why
      using errcode = 'invalid_parameter_value', hint = 'as in walcast.cached(''public.report(int)'', ''[7]'', tags => array[''orders''])';
  end if;
  return format('select pg_catalog.to_jsonb(%I.%I(%s))', f.nspname, f.proname, (select string_agg('a.a' || n, ', ' order by n) from generate_series(1, f.pronargs) n))
    || case when f.pronargs = 0 then '' else
      format(' from pg_catalog.jsonb_to_record($1) as a(%s)', (
        select string_agg(format('a%s %s', n, format_type(u, null)), ', ' order by n) from unnest(f.proargtypes) with ordinality x(u, n)))
    end;
end
$$;

create or replace function walcast.cached_args(args jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (select coalesce(jsonb_object_agg('a' || n, item), '{}') from jsonb_array_elements($1) with ordinality x(item, n));
end
$$;

-- The function's result as JSON, from the cache if it may be answered, else called as the caller, under the caller's row
-- security, and kept for the same caller in the same security context. Without tags only time, a change of rules and an
-- invalidation of the namespace end what is kept. The fence is taken before the function runs, so this is sound under
-- every isolation level.
--
-- The function runs and nothing is kept where keeping could not be sound: in a transaction that has written, in one that is
-- read only, on a standby, inside a security definer function of another role.
--
-- Without a search path of its own, since the function is to run under the caller's: so every name is written out.
create or replace function walcast.cached(
  "function" regprocedure, args jsonb default '[]', ttl interval default '5 minutes', tags text[] default '{}', namespace text default 'sql',
  vary text[] default '{}'
) returns jsonb
language plpgsql volatile as $$
declare
  path text := pg_catalog.current_setting('search_path');
  -- Else the result is of another role than the one it would be kept for.
  keeps boolean := current_user::text operator(pg_catalog.=) walcast.cache_caller();
  result jsonb := case when keeps then walcast.cached_find($1, $2, $3, $4, $5, $6, path) end;
  fence text;
  statement text;
begin
  if result is not null then
    return result;
  end if;
  statement := walcast.cached_call($1, $2);
  keeps := keeps and pg_catalog.pg_current_xact_id_if_assigned() is null;
  fence := walcast.cache_fence();
  execute statement into result using walcast.cached_args($2);
  result := coalesce(result, 'null'::jsonb);
  -- A function that wrote made a value of what nobody sees yet, and is to write each time it is called.
  if keeps and pg_catalog.pg_current_xact_id_if_assigned() is null then
    perform walcast.cached_keep($1, $2, $3, $4, $5, $6, path, result, fence);
  end if;
  return result;
end
$$;
