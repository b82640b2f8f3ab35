-- name: upcoming_appointments
-- describe: A patient's booked appointments, the nearest first. Booked and not "later than now": a clock cannot be cached.
-- param: patient_id bigint
-- ttl: 5m
-- max_rows: 100
select t.id, t.patient_id, t.provider_id, d.full_name as provider_name, t.kind, t.room, t.starts_at, t.duration_minutes
from appointments t
join providers d on d.id = t.provider_id
where t.patient_id = $1 and t.status = 'booked'
order by t.starts_at, t.id
limit 100
