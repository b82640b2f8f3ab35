-- Values from elsewhere are in the cache table too. SQL neither reads nor writes them: the memory of Walcast holds them as
-- well, and nothing would tell it that SQL put another value there.
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
