-- The clinic's people: made up, and the same on every machine.
-- Run once by `walcast dev` after 0001_clinic.sql; does nothing where there are patients already.
--
-- Every pick is an md5 of a fixed text, never random(), and user ids are md5 values too. Only the times hang on a clock:
-- they are counted back from this hour, or from `clinic.today` where that setting is given (for byte-equal data).
--
-- Who to try:
--   provider 1  user id md5('clinic:provider:1')::uuid, attends patients 1 to 25
--   patient 1   user id md5('clinic:patient:1')::uuid

begin;
set local client_min_messages = warning;

-- A number from 0 to n - 1 that follows from the text.
create or replace function pg_temp.pick(seed text, n integer) returns integer language sql immutable as $$
    select ('x' || substr(md5(seed), 1, 7))::bit(28)::integer % n
$$;

create or replace function pg_temp.pick(seed text, among text[]) returns text language sql immutable as $$
    select among[1 + pg_temp.pick(seed, cardinality(among))]
$$;

-- Holds one row on a fresh database and none later; every insert below reads it.
create temp table today on commit drop as
select coalesce(nullif(current_setting('clinic.today', true), '')::timestamptz, date_trunc('hour', now())) as at
where not exists (select from public.patients) and not exists (select from public.providers);

create temp table names on commit drop as
select array['Ada', 'Amara', 'Aylin', 'Beatriz', 'Bruno', 'Chen', 'Clara', 'Dario', 'Deniz', 'Elif', 'Emil', 'Esther',
             'Farah', 'Felix', 'Grace', 'Hana', 'Hugo', 'Ines', 'Ivo', 'Jonas', 'Josephine', 'Kenji', 'Kofi', 'Lara',
             'Leila', 'Liam', 'Lucia', 'Malik', 'Marta', 'Mei', 'Milan', 'Nadia', 'Nils', 'Noor', 'Oskar', 'Paula',
             'Priya', 'Rafael', 'Rosa', 'Samir', 'Sofia', 'Tariq', 'Tomas', 'Uma', 'Vera', 'Wanjiru', 'Yara', 'Zoe']
       as first_names,
       array['Abel', 'Adeyemi', 'Alvarez', 'Becker', 'Bianchi', 'Brandt', 'Costa', 'Dahl', 'Demir', 'Dubois', 'Eriksen',
             'Farkas', 'Fischer', 'Garcia', 'Haddad', 'Hansen', 'Ibrahim', 'Ito', 'Jansen', 'Kaya', 'Keller', 'Kowalski',
             'Kumar', 'Laurent', 'Lindqvist', 'Marino', 'Mbeki', 'Moreau', 'Murphy', 'Nakamura', 'Novak', 'Okafor',
             'Olsen', 'Patel', 'Pereira', 'Petrov', 'Rossi', 'Sato', 'Schmidt', 'Silva', 'Singh', 'Svensson', 'Tanaka',
             'Torres', 'Varga', 'Weber', 'Yilmaz', 'Zhang']
       as last_names;

insert into public.providers (id, user_id, full_name, title, specialty, ward, on_duty, created_at) overriding system value
select n,
       md5('clinic:provider:' || n)::uuid,
       case n when 1 then 'Ines Haddad'
              else pg_temp.pick('provider first ' || n, first_names) || ' ' || pg_temp.pick('provider last ' || n, last_names) end,
       case when n % 4 = 0 then 'RN' else 'MD' end,
       (array['Cardiology', 'Internal medicine', 'Pulmonology', 'Nursing', 'Nephrology', 'Geriatrics'])[1 + (n - 1) % 6],
       'Ward ' || chr(65 + (n - 1) % 4),
       n = 1 or pg_temp.pick('duty ' || n, 4) > 0,
       at - interval '400 days'
from today, names, generate_series(1, 12) n
order by n;

insert into public.patients (id, user_id, mrn, full_name, date_of_birth, sex, ward, bed, blood_type, allergies, risk,
                             admitted_at, created_at) overriding system value
select n,
       md5('clinic:patient:' || n)::uuid,
       'MRN-' || lpad((100000 + n * 37)::text, 7, '0'),
       case n when 1 then 'Jonas Weber'
              else pg_temp.pick('patient first ' || n, first_names) || ' ' || pg_temp.pick('patient last ' || n, last_names) end,
       date '1936-01-01' + pg_temp.pick('born ' || n, 25000),
       case n when 1 then 'male' else pg_temp.pick('sex ' || n, array['female', 'female', 'female', 'male', 'male', 'male', 'other']) end,
       'Ward ' || chr(65 + (home - 1) % 4),
       chr(65 + (home - 1) % 4) || lpad(n::text, 3, '0'),
       pg_temp.pick('blood ' || n, array['0+', '0+', 'A+', 'A+', 'A-', 'B+', 'AB+', '0-']),
       case pg_temp.pick('allergic ' || n, 3)
            when 0 then array[pg_temp.pick('allergy ' || n, array['penicillin', 'latex', 'ibuprofen', 'peanuts', 'iodine'])]
            else '{}'::text[] end,
       pg_temp.pick('risk ' || n, array['low', 'low', 'low', 'medium', 'medium', 'high']),
       at - make_interval(hours => 24 + pg_temp.pick('admitted ' || n, 480)),
       at - make_interval(hours => 24 + pg_temp.pick('admitted ' || n, 480))
from today, names, generate_series(1, 300) n,
     -- The attending provider: 1 for the first 25, then 25 patients for each of the other eleven.
     lateral (select case when n <= 25 then 1 else 2 + (n - 26) % 11 end as home) attending
order by n;

insert into public.assignments (provider_id, patient_id, duty, started_at)
select case when p.id <= 25 then 1 else 2 + (p.id - 26) % 11 end, p.id, 'attending', p.admitted_at
from today, public.patients p
order by p.id;

-- Every fifth patient has a second provider, who is never provider 1.
insert into public.assignments (provider_id, patient_id, duty, started_at)
select 2 + pg_temp.pick('second ' || p.id, 11), p.id, pg_temp.pick('duty of second ' || p.id, array['nursing', 'consulting']),
       p.admitted_at + interval '2 hours'
from today, public.patients p
where p.id % 5 = 0
order by p.id
on conflict do nothing;

-- Provider 1 once attended these three, and sees them no longer.
insert into public.assignments (provider_id, patient_id, duty, started_at, ended_at)
select 1, p.id, 'attending', p.admitted_at, p.admitted_at + interval '6 hours'
from today, public.patients p
where p.id between 26 and 28
order by p.id;

-- Three weeks of readings for all, and two days of hourly ones for provider 1's patients, oldest first.
insert into public.vital_signs (patient_id, heart_rate, systolic, diastolic, respiratory_rate, spo2, temperature_c, recorded_at)
select p.id,
       60 + pg_temp.pick('heart ' || p.id, 22) + strain * 9 + round(6 * sin(turn / 3.0 + p.id))::integer
          + pg_temp.pick('beat ' || p.id || ' ' || turn, 7) - 3,
       108 + pg_temp.pick('pressure ' || p.id, 26) + strain * 6 + pg_temp.pick('sys ' || p.id || ' ' || turn, 11) - 5,
       66 + pg_temp.pick('pressure ' || p.id, 14) + strain * 3 + pg_temp.pick('dia ' || p.id || ' ' || turn, 7) - 3,
       13 + strain * 2 + pg_temp.pick('breath ' || p.id || ' ' || turn, 4),
       least(100, 98 - strain * 2 + pg_temp.pick('oxygen ' || p.id || ' ' || turn, 3)),
       36.4 + strain * 0.4 + pg_temp.pick('warm ' || p.id || ' ' || turn, 6) / 10.0,
       at - ago
from today, public.patients p,
     lateral (select case p.risk when 'high' then 2 when 'medium' then 1 else 0 end as strain) strained,
     lateral (select i as turn, make_interval(hours => 504 - i * 40) as ago from generate_series(0, 11) i
              union all
              select 100 + i, make_interval(hours => 47 - i) from generate_series(0, 47) i where p.id <= 25) readings
order by ago desc, p.id;

insert into public.patient_alerts (patient_id, severity, kind, message, status, opened_at, closed_at)
select p.id, severity, kind, message, case when closed_at is null then 'open' else 'closed' end, opened_at, closed_at
from today, public.patients p, generate_series(1, 3) k,
     lateral (select pg_temp.pick('alert kind ' || p.id || ' ' || k, 6) as which) w,
     lateral (select (array['critical', 'critical', 'warning', 'warning', 'info', 'info'])[1 + which] as severity,
                     (array['tachycardia', 'low_oxygen', 'fever', 'blood_pressure', 'lab_result', 'fall_risk'])[1 + which] as kind,
                     (array['Heart rate above 120 for 10 minutes', 'Oxygen saturation below 90 %', 'Temperature above 38.5 °C',
                            'Blood pressure out of range', 'New laboratory result to review', 'Fall risk assessment due'])[1 + which]
                         as message) a,
     lateral (select at - make_interval(hours => k * 30 + pg_temp.pick('alert at ' || p.id || ' ' || k, 24)) as opened_at) o,
     -- The newest may still be open; older ones are closed.
     lateral (select case when k = 1 and pg_temp.pick('alert open ' || p.id, 3) = 0 then null
                          else opened_at + interval '3 hours' end as closed_at) c
where pg_temp.pick('alert at all ' || p.id || ' ' || k, 2) = 0 or (k = 1 and p.id <= 25)
order by opened_at, p.id;

insert into public.appointments (patient_id, provider_id, kind, room, status, starts_at, duration_minutes, updated_at)
select p.id, a.provider_id,
       pg_temp.pick('visit ' || p.id || ' ' || k, array['Round', 'Echocardiogram', 'Chest X-ray', 'Physiotherapy', 'Blood draw', 'Consultation']),
       'Room ' || 100 + pg_temp.pick('room ' || p.id || ' ' || k, 40),
       case when k > 0 then 'booked' when pg_temp.pick('missed ' || p.id, 6) = 0 then 'cancelled' else 'done' end,
       at + make_interval(days => k * 3, hours => pg_temp.pick('hour ' || p.id || ' ' || k, 9) - 4),
       15 * (1 + pg_temp.pick('long ' || p.id || ' ' || k, 4)),
       at - interval '4 days'
from today, public.patients p
join public.assignments a on a.patient_id = p.id and a.duty = 'attending' and a.ended_at is null,
     generate_series(-1, 2) k
where k <> 0 and (k <> 2 or p.id % 2 = 0)
order by p.id, k;

insert into public.medications (patient_id, prescribed_by, name, dose, unit, taken_at, instructions, active, started_on, prescribed_at)
select p.id, a.provider_id,
       (array['Metoprolol', 'Amlodipine', 'Furosemide', 'Metformin', 'Atorvastatin', 'Pantoprazole', 'Salbutamol', 'Enoxaparin'])[1 + drug],
       (array[47.5, 5, 40, 850, 20, 40, 2.5, 40])[1 + drug],
       'mg',
       case k when 1 then array['08:00', '20:00'] else array['08:00'] end,
       jsonb_build_object('with_food', pg_temp.pick('food ' || p.id || k, 2) = 0, 'max_per_day', k),
       k < 4, (at - make_interval(days => 3 * k))::date, at - make_interval(days => 3 * k)
from today, public.patients p
join public.assignments a on a.patient_id = p.id and a.duty = 'attending' and a.ended_at is null,
     generate_series(1, 4) k,
     lateral (select (pg_temp.pick('drug ' || p.id, 8) + k) % 8 as drug) d
where k <= 2 + pg_temp.pick('how many drugs ' || p.id, 3)
order by p.id, k;

insert into public.messages (patient_id, provider_id, sender, body, is_read, sent_at)
select p.id, a.provider_id, case k % 2 when 1 then 'patient' else 'provider' end,
       case k % 2 when 1
            then pg_temp.pick('asks ' || p.id || k, array['When may I get up again?', 'I slept badly, could we talk about the dose?',
                                                          'Is the result of the blood test back?', 'May my family come tomorrow afternoon?'])
            else pg_temp.pick('answers ' || p.id || k, array['We will discuss it at the round this morning.', 'The result looks good.',
                                                             'Yes, from two o''clock on.', 'I have changed the dose, please try it tonight.']) end,
       k < 3, at - make_interval(hours => 40 - k * 9, mins => pg_temp.pick('sent ' || p.id, 60))
from today, public.patients p
join public.assignments a on a.patient_id = p.id and a.duty = 'attending' and a.ended_at is null,
     generate_series(1, 3) k
where k <= 1 + pg_temp.pick('chatty ' || p.id, 3)
order by p.id, k;

insert into public.care_plans (patient_id, provider_id, title, goals, status, review_on, updated_at)
select p.id, a.provider_id,
       pg_temp.pick('plan ' || p.id, array['Heart failure pathway', 'Recovery after surgery', 'Diabetes care', 'COPD pathway', 'Mobilisation']),
       jsonb_build_array(
           jsonb_build_object('goal', pg_temp.pick('goal a ' || p.id, array['Walk 50 m without help', 'Systolic below 140', 'Weight stable for 3 days']),
                              'done', pg_temp.pick('done a ' || p.id, 2) = 0),
           jsonb_build_object('goal', pg_temp.pick('goal b ' || p.id, array['Explain the medication', 'Oxygen above 94 % at rest', 'Pain below 3 of 10']),
                              'done', pg_temp.pick('done b ' || p.id, 3) = 0)),
       'active', (at + make_interval(days => 1 + pg_temp.pick('review ' || p.id, 14)))::date, at - interval '1 day'
from today, public.patients p
join public.assignments a on a.patient_id = p.id and a.duty = 'attending' and a.ended_at is null
order by p.id;

-- The ids of people were given, not drawn: set their sequences behind the last one.
select setval(pg_get_serial_sequence('public.providers', 'id'), (select max(id) from public.providers)),
       setval(pg_get_serial_sequence('public.patients', 'id'), (select max(id) from public.patients));

commit;

analyze public.providers, public.patients, public.assignments, public.vital_signs, public.patient_alerts,
        public.appointments, public.medications, public.messages, public.care_plans;
