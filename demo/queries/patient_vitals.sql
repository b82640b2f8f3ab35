-- name: patient_vitals
-- describe: A patient's vital signs, newest first.
-- param: patient_id bigint
-- param: readings bigint = 48
-- ttl: 5m
-- max_rows: 500
select id, patient_id, heart_rate, systolic, diastolic, respiratory_rate, spo2, temperature_c, recorded_at
from vital_signs
where patient_id = $1
order by recorded_at desc, id desc
limit $2
