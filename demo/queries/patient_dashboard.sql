-- name: patient_dashboard
-- describe: One row for one patient: who it is, latest vital signs, open alerts, next appointment, medications, care plan.
-- param: patient_id bigint
-- ttl: 5m
-- max_rows: 1
-- Each part is held to patient_id = $1, so that only a change of this patient's own rows drops the answer.
select
    jsonb_build_object('id', p.id, 'mrn', p.mrn, 'full_name', p.full_name, 'date_of_birth', p.date_of_birth, 'sex', p.sex,
                       'ward', p.ward, 'bed', p.bed, 'blood_type', p.blood_type, 'allergies', p.allergies, 'risk', p.risk,
                       'admitted_at', p.admitted_at) as patient,
    (select coalesce(jsonb_agg(jsonb_build_object('id', v.id, 'heart_rate', v.heart_rate, 'systolic', v.systolic,
                                                  'diastolic', v.diastolic, 'respiratory_rate', v.respiratory_rate,
                                                  'spo2', v.spo2, 'temperature_c', v.temperature_c,
                                                  'recorded_at', v.recorded_at)
                               order by v.recorded_at desc, v.id desc), '[]'::jsonb)
     from (select * from vital_signs where patient_id = $1 order by recorded_at desc, id desc limit 24) v) as vitals,
    (select coalesce(jsonb_agg(jsonb_build_object('id', a.id, 'severity', a.severity, 'kind', a.kind, 'message', a.message,
                                                  'opened_at', a.opened_at)
                               order by a.opened_at desc, a.id desc), '[]'::jsonb)
     from patient_alerts a where a.patient_id = $1 and a.status = 'open') as open_alerts,
    (select jsonb_build_object('id', t.id, 'kind', t.kind, 'room', t.room, 'starts_at', t.starts_at,
                               'duration_minutes', t.duration_minutes, 'provider_id', t.provider_id)
     from appointments t where t.patient_id = $1 and t.status = 'booked'
     order by t.starts_at, t.id limit 1) as next_appointment,
    (select coalesce(jsonb_agg(jsonb_build_object('id', m.id, 'name', m.name, 'dose', m.dose, 'unit', m.unit,
                                                  'taken_at', m.taken_at, 'started_on', m.started_on)
                               order by m.name, m.id), '[]'::jsonb)
     from medications m where m.patient_id = $1 and m.active) as medications,
    (select jsonb_build_object('id', c.id, 'title', c.title, 'goals', c.goals, 'review_on', c.review_on)
     from care_plans c where c.patient_id = $1 and c.status = 'active'
     order by c.updated_at desc, c.id desc limit 1) as care_plan
from patients p
where p.id = $1
