-- Invalidations by hand that no tag can express (a pattern over keys, "all of these tags", soft ones), beside the tag clock
-- and kept with it: an entry is touched by a row unless `lsn` is at or below the entry's settled LSN or its snapshot sees `xid`.

create unlogged table if not exists walcast.selections (
  lsn pg_lsn not null,
  xid xid8 not null,
  heard_at timestamptz not null,
  -- {"namespace"?, "pattern"?, "all_of"?: […], "any_of"?: […], "soft"?}: all that is named must hold.
  content jsonb not null
);

revoke all on walcast.selections from public;
