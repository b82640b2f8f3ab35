-- Up to where every commit was visible when the checkpoint was written. Whoever sees this row has a snapshot that was taken
-- later, and so sees them all: from it SQL makes the fence of a value.

alter table walcast.sentinel add column if not exists settled_lsn pg_lsn not null default '0/0';
