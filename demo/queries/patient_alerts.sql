-- name: patient_alerts
-- describe: A patient's alerts, open and closed, newest first.
-- param: patient_id bigint
-- ttl: 5m
-- max_rows: 200
select id, patient_id, severity, kind, message, status, opened_at, closed_at
from patient_alerts
where patient_id = $1
order by opened_at desc, id desc
limit 200
