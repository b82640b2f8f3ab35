//! The rights of the role that `walcast serve` logs in as: all that it needs and nothing else.

use walcast_pg::quote_literal;

/// One block that gives what is missing; running it again changes nothing.
pub(super) fn grants(role: &str) -> String {
    format!(
        r#"do $walcast$
declare
  serve constant text := {role};
  target text;
begin
  if not exists (select from pg_catalog.pg_roles where rolname = serve) then
    execute format('create role %I login replication noinherit', serve);
  end if;
  if not has_database_privilege(serve, current_database(), 'connect') then
    execute format('grant connect on database %I to %I', current_database(), serve);
  end if;
  -- So that it may become these roles, one transaction at a time, and has none of their rights otherwise.
  foreach target in array array['anon', 'authenticated', 'service_role'] loop
    if target = serve then
      continue;
    elsif current_setting('server_version_num')::int >= 160000 then
      if not pg_has_role(serve, target, 'set') then
        execute format('grant %I to %I with inherit false, set true', target, serve);
      end if;
    elsif not pg_has_role(serve, target, 'member') then
      execute format('grant %I to %I', target, serve);
    end if;
  end loop;
  if not has_schema_privilege(serve, 'walcast', 'usage') then
    execute format('grant usage on schema walcast to %I', serve);
  end if;
  for target in
    select c.oid::regclass::text from pg_catalog.pg_class c
    where c.relnamespace = 'walcast'::regnamespace and c.relkind in ('r', 'p') and c.relname not in ({own_tables})
      and not (has_table_privilege(serve, c.oid, 'select') and has_table_privilege(serve, c.oid, 'insert')
        and has_table_privilege(serve, c.oid, 'update') and has_table_privilege(serve, c.oid, 'delete'))
    order by 1
  loop
    execute format('grant select, insert, update, delete on %s to %I', target, serve);
  end loop;
  for target in
    select c.oid::regclass::text from pg_catalog.pg_class c
    where c.relnamespace = 'walcast'::regnamespace and c.relkind = 'v' and not has_table_privilege(serve, c.oid, 'select')
    order by 1
  loop
    execute format('grant select on %s to %I', target, serve);
  end loop;
  if not has_table_privilege(serve, 'walcast.migrations', 'select') then
    execute format('grant select on walcast.migrations to %I', serve);
  end if;
end
$walcast$;
"#,
        role = quote_literal(role).trim_start(),
        own_tables = super::own_tables(),
    )
}
