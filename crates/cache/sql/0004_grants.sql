-- What SQL must know of the config: the cache's limits, its namespaces, and who may use them.
-- `walcast migrate` writes these tables from the config each time it runs. No role but their owner has rights on them.

create table if not exists walcast.cache_settings (
  "only" boolean primary key default true check ("only"),
  publication text not null,
  max_staleness interval not null,
  max_value_bytes bigint not null,
  default_ttl interval not null,
  strict boolean not null
);

create table if not exists walcast.cache_namespaces (
  namespace text primary key,
  ttl interval,
  -- Carried by every entry.
  tags text[] not null default '{}',
  -- Values do not come from this database: they are in the memory of Walcast alone.
  external boolean not null default false,
  -- Each security context has its own entry under a key.
  per_context boolean not null default false
);

-- Namespace `*` means all of them and is never written by migrate: it is for an administrator to give.
create table if not exists walcast.namespace_grants (
  namespace text not null,
  role text not null,
  can_read boolean not null default false,
  can_write boolean not null default false,
  can_invalidate boolean not null default false,
  primary key (namespace, role)
);

revoke all on walcast.cache_settings, walcast.cache_namespaces, walcast.namespace_grants from public;

-- Who calls: the role that the session has taken, else the one that it logged in as. A session takes only roles that it is a
-- member of, so this gives nobody more than he has. `current_user` would be the owner of whichever function is around us.
create or replace function walcast.cache_caller() returns text
language sql stable
return case current_setting('role') when 'none' then session_user::text else current_setting('role') end;

-- May the caller do this in the namespace? `service_role` may everything, others what they or a role whose rights they
-- inherit are granted.
create or replace function walcast.cache_may(namespace text, wish text) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  caller name := walcast.cache_caller();
begin
  return exists (
    select from pg_roles r where r.rolname = 'service_role' and pg_has_role(caller, r.oid, 'usage')
  ) or exists (
    select from walcast.namespace_grants g join pg_roles r on r.rolname = g.role
    where g.namespace in ($1, '*') and pg_has_role(caller, r.oid, 'usage')
      and case $2 when 'read' then g.can_read when 'write' then g.can_write when 'invalidate' then g.can_invalidate end
  );
end
$$;

-- Names who may not do what, and what mends it.
create or replace function walcast.cache_require(namespace text, wish text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if $1 is null or $1 !~ '^[a-zA-Z0-9_.-]{1,64}$' then
    raise exception 'namespace % must be 1 to 64 of the characters a-z, A-Z, 0-9, "_", "-", "."', coalesce(quote_literal(left($1, 64)), 'null')
      using errcode = 'invalid_parameter_value', hint = 'as in walcast.cache_get(''patients'', ''7'')';
  end if;
  if starts_with($1, 'query.') then
    raise exception 'namespace "%" holds what queries keep', $1
      using errcode = 'insufficient_privilege', hint = 'ask the query, by GET /query/v1/NAME';
  end if;
  if not walcast.cache_may($1, $2) then
    raise exception 'role "%" has no right to % in cache namespace "%"', walcast.cache_caller(), $2, $1
      using errcode = 'insufficient_privilege',
        hint = format('list the role in walcast.toml below [cache.namespaces.%s], as in %s = ["%s"], then run walcast migrate; a namespace that is not there is for service_role',
          $1, $2, walcast.cache_caller());
  end if;
  if exists (select from walcast.cache_settings s where s.strict)
    and not exists (select from walcast.cache_namespaces n where n.namespace = $1) then
    raise exception 'there is no cache namespace "%", and cache.strict is on', $1
      using errcode = 'undefined_object', hint = format('add [cache.namespaces.%s] to walcast.toml and run walcast migrate', $1);
  end if;
end
$$;
