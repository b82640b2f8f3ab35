-- What policies ask about the caller, as on Supabase. A function that exists stays as it is.

create schema if not exists auth;

do $walcast$
begin
  if to_regprocedure('auth.jwt()') is null then
    create function auth.jwt() returns jsonb language sql stable as $$
      select coalesce(
        nullif(current_setting('request.jwt.claims', true), ''),
        nullif(current_setting('request.jwt.claim', true), '')
      )::jsonb
    $$;
  end if;
  if to_regprocedure('auth.uid()') is null then
    create function auth.uid() returns uuid language sql stable as $$
      select coalesce(
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub',
        nullif(current_setting('request.jwt.claim.sub', true), '')
      )::uuid
    $$;
  end if;
  if to_regprocedure('auth.role()') is null then
    create function auth.role() returns text language sql stable as $$
      select coalesce(
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role',
        nullif(current_setting('request.jwt.claim.role', true), '')
      )
    $$;
  end if;
  if to_regprocedure('auth.email()') is null then
    create function auth.email() returns text language sql stable as $$
      select coalesce(
        nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'email',
        nullif(current_setting('request.jwt.claim.email', true), '')
      )
    $$;
  end if;
end
$walcast$;

-- Only what is missing: on Supabase these rights exist and belong to another owner.
do $walcast$
declare
  reader text;
  asked text;
begin
  foreach reader in array array['anon', 'authenticated', 'service_role'] loop
    if not has_schema_privilege(reader, 'auth', 'usage') then
      execute format('grant usage on schema auth to %I', reader);
    end if;
    foreach asked in array array['auth.jwt()', 'auth.uid()', 'auth.role()', 'auth.email()'] loop
      if not has_function_privilege(reader, asked, 'execute') then
        execute format('grant execute on function %s to %I', asked, reader);
      end if;
    end loop;
  end loop;
end
$walcast$;
