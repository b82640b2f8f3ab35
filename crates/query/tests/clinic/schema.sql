-- A small clinic: patients see themselves, providers see the patients they are assigned to.
do $$ begin
  if not exists (select from pg_roles where rolname = 'authenticated') then create role authenticated nologin noinherit; end if;
  if not exists (select from pg_roles where rolname = 'service_role') then create role service_role nologin noinherit bypassrls; end if;
  if not exists (select from pg_roles where rolname = 'outsider') then create role outsider nologin; end if;
end $$;
create schema auth;
create function auth.jwt() returns jsonb language sql stable as
  $$ select nullif(current_setting('request.jwt.claims', true), '')::jsonb $$;
create function auth.uid() returns uuid language sql stable as
  $$ select (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid $$;
grant usage on schema auth to authenticated, service_role, outsider;

create table patients (id bigint primary key, user_id uuid unique, name text not null, tenant varchar);
create index on patients (tenant);
create table providers (id bigint primary key, user_id uuid unique, name text not null);
create table assignments (id bigint primary key, patient_id bigint references patients on delete cascade, provider_id bigint references providers on delete cascade);
create table vital_signs (id bigint primary key, patient_id bigint references patients on delete cascade, pulse int not null);
create table alerts (id bigint primary key, patient_id int references patients on delete cascade, open boolean not null, kind text not null);
create index on alerts (open);
create index on alerts (kind);
create view open_alerts with (security_invoker = true) as select id, patient_id, kind from alerts where open;
create view pulses as select patient_id, max(pulse) as highest, count(*) as measured from vital_signs group by patient_id;

alter table patients enable row level security;
alter table providers enable row level security;
alter table assignments enable row level security;
alter table vital_signs enable row level security;
alter table alerts enable row level security;

create policy p on patients for select to authenticated using (user_id = auth.uid()
  or exists (select from assignments a join providers p on p.id = a.provider_id where a.patient_id = patients.id and p.user_id = auth.uid()));
create policy p on providers for select to authenticated using (true);
create policy p on assignments for select to authenticated using (true);
create policy p on vital_signs for select to authenticated using (patient_id in (select id from patients where user_id = auth.uid())
  or exists (select 1 from assignments a join providers p on p.id = a.provider_id
             where a.patient_id = vital_signs.patient_id and p.user_id = auth.uid()));
create policy mine on alerts for select to authenticated using (patient_id in (select id from patients where user_id = auth.uid()));
create policy assigned on alerts for select to authenticated using (patient_id in (
  select a.patient_id from assignments a join providers p on p.id = a.provider_id where p.user_id = auth.uid()));
create policy quiet on alerts as restrictive for select to authenticated using (kind <> 'secret');

-- Without the old row's foreign keys: what was unknown must count as touched.
alter table patients replica identity full;
alter table providers replica identity full;
alter table assignments replica identity full;
alter table alerts replica identity full;

grant select on all tables in schema public to authenticated, service_role;
create publication walcast for table patients, providers, assignments, vital_signs, alerts;
