-- What the stream carries. Both begin empty; a publication that exists stays as it is.
-- Never FOR ALL TABLES: a published table without a replica identity refuses the application's own UPDATE and DELETE.

do $walcast$
begin
  -- Feeds the cache and the live updates.
  if not exists (select from pg_catalog.pg_publication where pubname = 'walcast') then
    create publication walcast with (publish_via_partition_root = true);
  end if;
  -- What clients may subscribe to, as on Supabase.
  if not exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
    create publication supabase_realtime;
  end if;
end
$walcast$;
