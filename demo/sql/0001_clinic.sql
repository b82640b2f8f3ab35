-- The clinic: tables, row security and publications of the demo.
-- Run once by `walcast dev`, after `walcast migrate` has made the roles (anon, authenticated, service_role),
-- auth.uid() and the two publications. Needs no extension; running it again changes nothing.
--
-- Who sees what:
--   a patient   the rows that are about him or her      (patients.user_id = auth.uid())
--   a provider  the rows about the patients assigned now (assignments, not yet ended)
--   anon        nothing
-- Nobody writes with a user's token: writing is for service_role and the owner.
--
-- How the policies stay free of recursion, without security definer functions: they look in one direction only.
--   records (vital_signs, …) -> patients -> assignments -> providers -> nothing
-- So assignments must not ask patients, and therefore a patient does not read assignments.

begin;
set local client_min_messages = warning;

create table if not exists public.providers (
    id          bigint generated always as identity primary key,
    user_id     uuid unique,
    full_name   text not null,
    title       text not null,
    specialty   text not null,
    ward        text not null,
    on_duty     boolean not null default true,
    created_at  timestamptz not null default now()
);

create table if not exists public.patients (
    id            bigint generated always as identity primary key,
    user_id       uuid unique,
    mrn           text not null unique,
    full_name     text not null,
    date_of_birth date not null,
    sex           text not null check (sex in ('female', 'male', 'other')),
    ward          text not null,
    bed           text not null,
    blood_type    text not null,
    allergies     text[] not null default '{}',
    risk          text not null default 'low' check (risk in ('low', 'medium', 'high')),
    admitted_at   timestamptz not null,
    created_at    timestamptz not null default now()
);

create table if not exists public.assignments (
    id          bigint generated always as identity primary key,
    provider_id bigint not null references public.providers (id) on delete cascade,
    patient_id  bigint not null references public.patients (id) on delete cascade,
    duty        text not null default 'attending' check (duty in ('attending', 'nursing', 'consulting')),
    started_at  timestamptz not null,
    ended_at    timestamptz,
    unique (provider_id, patient_id)
);

create table if not exists public.vital_signs (
    id               bigint generated always as identity primary key,
    patient_id       bigint not null references public.patients (id) on delete cascade,
    heart_rate       integer not null,
    systolic         integer not null,
    diastolic        integer not null,
    respiratory_rate integer not null,
    spo2             integer not null,
    temperature_c    numeric(4, 1) not null,
    recorded_at      timestamptz not null default now()
);

create table if not exists public.patient_alerts (
    id          bigint generated always as identity primary key,
    patient_id  bigint not null references public.patients (id) on delete cascade,
    severity    text not null check (severity in ('info', 'warning', 'critical')),
    kind        text not null,
    message     text not null,
    status      text not null default 'open' check (status in ('open', 'closed')),
    opened_at   timestamptz not null default now(),
    closed_at   timestamptz,
    check ((status = 'closed') = (closed_at is not null))
);

create table if not exists public.appointments (
    id               bigint generated always as identity primary key,
    patient_id       bigint not null references public.patients (id) on delete cascade,
    provider_id      bigint not null references public.providers (id) on delete cascade,
    kind             text not null,
    room             text not null,
    status           text not null default 'booked' check (status in ('booked', 'done', 'cancelled')),
    starts_at        timestamptz not null,
    duration_minutes integer not null default 30,
    updated_at       timestamptz not null default now()
);

create table if not exists public.medications (
    id            bigint generated always as identity primary key,
    patient_id    bigint not null references public.patients (id) on delete cascade,
    prescribed_by bigint references public.providers (id) on delete set null,
    name          text not null,
    dose          numeric(8, 2) not null,
    unit          text not null,
    taken_at      text[] not null default '{}',
    instructions  jsonb not null default '{}',
    active        boolean not null default true,
    started_on    date not null,
    prescribed_at timestamptz not null default now()
);

create table if not exists public.messages (
    id          bigint generated always as identity primary key,
    patient_id  bigint not null references public.patients (id) on delete cascade,
    provider_id bigint not null references public.providers (id) on delete cascade,
    sender      text not null check (sender in ('patient', 'provider')),
    body        text not null,
    is_read     boolean not null default false,
    sent_at     timestamptz not null default now()
);

create table if not exists public.care_plans (
    id          bigint generated always as identity primary key,
    patient_id  bigint not null references public.patients (id) on delete cascade,
    provider_id bigint references public.providers (id) on delete set null,
    title       text not null,
    goals       jsonb not null default '[]',
    status      text not null default 'active' check (status in ('active', 'completed')),
    review_on   date not null,
    updated_at  timestamptz not null default now()
);

-- Every foreign key has an index, and each index also serves the query that reads it.
create index if not exists assignments_patient on public.assignments (patient_id);
create index if not exists vital_signs_patient on public.vital_signs (patient_id, recorded_at desc, id desc);
create index if not exists patient_alerts_patient on public.patient_alerts (patient_id, status);
create index if not exists appointments_patient on public.appointments (patient_id, starts_at);
create index if not exists appointments_provider on public.appointments (provider_id, starts_at);
create index if not exists medications_patient on public.medications (patient_id);
create index if not exists medications_prescriber on public.medications (prescribed_by);
create index if not exists messages_patient on public.messages (patient_id, sent_at desc);
create index if not exists messages_provider on public.messages (provider_id);
create index if not exists care_plans_patient on public.care_plans (patient_id);
create index if not exists care_plans_provider on public.care_plans (provider_id);

-- One loop for what is the same for every table.
do $$
declare
    name text;
    pub text;
begin
    foreach name in array array['providers', 'patients', 'assignments', 'vital_signs', 'patient_alerts',
                                'appointments', 'medications', 'messages', 'care_plans'] loop
        execute format('alter table public.%I enable row level security', name);

        -- Each table is secured, or narrowed by queries, through a column outside its primary key. Only the full old
        -- row lets an UPDATE or DELETE be judged against the old owner and drop exactly that patient's entries.
        execute format('alter table public.%I replica identity full', name);

        -- A database may come with default privileges that give everything to everybody: take them back first.
        execute format('revoke all on public.%I from public, anon, authenticated', name);
        execute format('grant select on public.%I to authenticated', name);
        execute format('grant all on public.%I to service_role', name);

        foreach pub in array array['walcast', 'supabase_realtime'] loop
            if not exists (select from pg_publication_tables t
                           where t.pubname = pub and t.schemaname = 'public' and t.tablename = name) then
                execute format('alter publication %I add table public.%I', pub, name);
            end if;
        end loop;
    end loop;
end
$$;

grant usage on schema public to anon, authenticated, service_role;
grant usage on all sequences in schema public to service_role;

-- The staff directory is open to whoever is signed in: it holds no record of anybody, and a patient may know who treats
-- him. It asks no other table, which is what ends the chain.
drop policy if exists "the staff directory is open to the signed in" on public.providers;
create policy "the staff directory is open to the signed in" on public.providers
    for select to authenticated using (true);

drop policy if exists "providers see their assignments" on public.assignments;
create policy "providers see their assignments" on public.assignments
    for select to authenticated
    using (provider_id in (select p.id from public.providers p where p.user_id = auth.uid()));

drop policy if exists "patients see themselves" on public.patients;
create policy "patients see themselves" on public.patients
    for select to authenticated using (user_id = auth.uid());

drop policy if exists "providers see assigned patients" on public.patients;
create policy "providers see assigned patients" on public.patients
    for select to authenticated
    using (id in (select a.patient_id
                  from public.assignments a
                  join public.providers p on p.id = a.provider_id
                  where p.user_id = auth.uid() and a.ended_at is null));

-- The records about a patient all follow the same two rules.
do $$
declare
    name text;
begin
    foreach name in array array['vital_signs', 'patient_alerts', 'appointments', 'medications',
                                'messages', 'care_plans'] loop
        execute format('drop policy if exists "patients see their own records" on public.%I', name);
        execute format('create policy "patients see their own records" on public.%I for select to authenticated
            using (patient_id in (select p.id from public.patients p where p.user_id = auth.uid()))', name);

        execute format('drop policy if exists "providers see assigned patients'' records" on public.%I', name);
        execute format('create policy "providers see assigned patients'' records" on public.%I for select to authenticated
            using (patient_id in (select a.patient_id
                                  from public.assignments a
                                  join public.providers p on p.id = a.provider_id
                                  where p.user_id = auth.uid() and a.ended_at is null))', name);
    end loop;
end
$$;

commit;
