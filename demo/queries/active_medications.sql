-- name: active_medications
-- describe: What a patient takes at present, with dose, times and instructions.
-- param: patient_id bigint
-- ttl: 5m
-- max_rows: 100
select id, patient_id, name, dose, unit, taken_at, instructions, started_on, prescribed_at
from medications
where patient_id = $1 and active
order by name, id
limit 100
