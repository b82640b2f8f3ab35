-- name: patient_messages
-- describe: The conversation between a patient and the providers, newest first.
-- param: patient_id bigint
-- ttl: 5m
-- max_rows: 200
select id, patient_id, provider_id, sender, body, is_read, sent_at
from messages
where patient_id = $1
order by sent_at desc, id desc
limit 200
