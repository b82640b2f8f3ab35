-- What Walcast remembers of the stream. Only the serve role and the owner may touch it.

create schema if not exists walcast;
revoke all on schema walcast from public;

-- Logged: survives a crash, so that old positions are still recognised afterwards.
create table if not exists walcast.state (
  "only" boolean primary key default true check ("only"),
  epoch text not null,
  system_identifier text,
  timeline int,
  slot text,
  floor bigint not null default 1,
  updated_at timestamptz not null default now()
);

-- Unlogged: emptied by crash recovery, together with the sentinel that says whether it can be trusted.
create unlogged table if not exists walcast.clock (
  slot_index int primary key,
  dropped pg_lsn not null,
  stamps bytea not null
);

create unlogged table if not exists walcast.sentinel (
  "only" boolean primary key default true check ("only"),
  epoch text not null,
  floor bigint not null,
  clock_lsn pg_lsn not null,
  hash_version int not null,
  slots int not null,
  rules_hash text not null,
  updated_at timestamptz not null default now()
);

revoke all on walcast.state, walcast.clock, walcast.sentinel from public;
