-- What the demo writes while it runs: three statements, run in turn with the owner's or service_role's rights.
-- Each takes $1 bigint, a random number of any size and sign that the writer supplies, so no statement draws by itself:
-- the same number on the same rows gives the same write. Three of four writes fall on provider 1's patients, whom the
-- page shows first. Every table keeps its size, so that a demo may run for days.
-- The writer reads this file by its "-- name:" lines. Each part is one statement, with the only semicolon at its end.

-- name: vital_sign
-- A new reading for one patient, a small step from the last one and drawn back to what is usual. Of more than 240
-- readings of this patient the oldest leave.
with chance as (
    select $1::bigint & 9223372036854775807 as n
), who as (
    select p.id, case p.risk when 'high' then 96 when 'medium' then 84 else 74 end as usual
    from patients p, chance
    where n % 4 = 0 or exists (select from assignments a where a.patient_id = p.id and a.provider_id = 1 and a.ended_at is null)
    order by md5(p.id::text || ' ' || n), p.id
    limit 1
), last as (
    select w.id as patient_id, w.usual,
           coalesce(v.heart_rate, w.usual) as heart_rate, coalesce(v.systolic, 122) as systolic,
           coalesce(v.diastolic, 78) as diastolic, coalesce(v.respiratory_rate, 15) as respiratory_rate,
           coalesce(v.spo2, 97) as spo2, coalesce(v.temperature_c, 36.8) as temperature_c
    from who w
    left join lateral (select * from vital_signs s where s.patient_id = w.id
                       order by s.recorded_at desc, s.id desc limit 1) v on true
), aged as (
    delete from vital_signs
    where id in (select s.id from vital_signs s, who w where s.patient_id = w.id
                 order by s.recorded_at desc, s.id desc offset 239)
)
insert into vital_signs (patient_id, heart_rate, systolic, diastolic, respiratory_rate, spo2, temperature_c, recorded_at)
select patient_id,
       least(165, greatest(42, heart_rate + sign(usual - heart_rate)::int + (n / 7 % 9)::int - 4)),
       least(190, greatest(85, systolic + sign(124 - systolic)::int + (n / 11 % 7)::int - 3)),
       least(115, greatest(50, diastolic + sign(78 - diastolic)::int + (n / 13 % 5)::int - 2)),
       least(30, greatest(9, respiratory_rate + sign(15 - respiratory_rate)::int + (n / 17 % 3)::int - 1)),
       least(100, greatest(86, spo2 + sign(97 - spo2)::int + (n / 19 % 3)::int - 1)),
       least(40.5, greatest(35.5, temperature_c + sign(36.9 - temperature_c) * 0.1 + (n / 23 % 3 - 1) * 0.1)),
       clock_timestamp()
from last, chance;

-- name: alert
-- Closes one open alert when a patient has any, else opens one. Closed alerts of this patient beyond 20 leave.
with chance as (
    select $1::bigint & 9223372036854775807 as n
), who as (
    select p.id
    from patients p, chance
    where n % 4 = 0 or exists (select from assignments a where a.patient_id = p.id and a.provider_id = 1 and a.ended_at is null)
    order by md5('alert ' || p.id::text || ' ' || n), p.id
    limit 1
), closed as (
    update patient_alerts set status = 'closed', closed_at = clock_timestamp()
    where id = (select a.id from patient_alerts a, who w where a.patient_id = w.id and a.status = 'open'
                order by a.opened_at, a.id limit 1)
    returning id
), aged as (
    delete from patient_alerts
    where id in (select a.id from patient_alerts a, who w where a.patient_id = w.id and a.status = 'closed'
                 order by a.closed_at desc, a.id desc offset 20)
)
insert into patient_alerts (patient_id, severity, kind, message, opened_at)
select w.id,
       (array['critical', 'warning', 'warning', 'info'])[1 + n / 7 % 4],
       (array['tachycardia', 'fever', 'blood_pressure', 'lab_result'])[1 + n / 7 % 4],
       (array['Heart rate above 120 for 10 minutes', 'Temperature above 38.5 °C', 'Blood pressure out of range',
              'New laboratory result to review'])[1 + n / 7 % 4],
       clock_timestamp()
from who w, chance
where not exists (select from closed);

-- name: appointment
-- Moves one patient's next booked appointment by 15 minutes to 2 hours, sometimes to another room.
with chance as (
    select $1::bigint & 9223372036854775807 as n
), who as (
    select p.id
    from patients p, chance
    where n % 4 = 0 or exists (select from assignments a where a.patient_id = p.id and a.provider_id = 1 and a.ended_at is null)
    order by md5('appointment ' || p.id::text || ' ' || n), p.id
    limit 1
)
update appointments t
set starts_at = date_trunc('hour', clock_timestamp()) + interval '1 day' + make_interval(mins => 15 * (1 + (n / 7 % 8)::int)),
    room = 'Room ' || 100 + n / 11 % 40,
    updated_at = clock_timestamp()
from chance
where t.id = (select a.id from appointments a, who w where a.patient_id = w.id and a.status = 'booked'
              order by a.starts_at, a.id limit 1);
