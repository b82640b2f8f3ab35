-- The roles that tokens name, as on Supabase. A role that exists stays as it is.

do $walcast$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'anon') then
    create role anon nologin noinherit;
  end if;
  if not exists (select from pg_catalog.pg_roles where rolname = 'authenticated') then
    create role authenticated nologin noinherit;
  end if;
  if not exists (select from pg_catalog.pg_roles where rolname = 'service_role') then
    create role service_role nologin noinherit bypassrls;
  end if;
end
$walcast$;

do $walcast$
declare
  reader text;
begin
  foreach reader in array array['anon', 'authenticated', 'service_role'] loop
    if to_regnamespace('public') is not null and not has_schema_privilege(reader, 'public', 'usage') then
      execute format('grant usage on schema public to %I', reader);
    end if;
  end loop;
end
$walcast$;
