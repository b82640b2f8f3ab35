-- name: ward
-- describe: The patients the caller may see, each with the last readings (newest first) and the open alerts. Row security picks them.
-- ttl: 1m
-- max_rows: 500
-- Not narrowed, since it spans many patients. Any change of these three tables drops it.
select p.id, p.mrn, p.full_name, p.date_of_birth, p.ward, p.bed, p.risk, v.vitals, a.open_alerts, a.open_alert_count
from patients p
cross join lateral (
    select coalesce(jsonb_agg(jsonb_build_object('id', r.id, 'heart_rate', r.heart_rate, 'systolic', r.systolic,
                                                 'diastolic', r.diastolic, 'spo2', r.spo2,
                                                 'temperature_c', r.temperature_c, 'recorded_at', r.recorded_at)
                              order by r.recorded_at desc, r.id desc), '[]'::jsonb) as vitals
    from (select * from vital_signs s where s.patient_id = p.id order by s.recorded_at desc, s.id desc limit 24) r
) v
cross join lateral (
    select count(*)::int as open_alert_count,
           coalesce(jsonb_agg(jsonb_build_object('id', o.id, 'severity', o.severity, 'kind', o.kind,
                                                 'message', o.message, 'opened_at', o.opened_at)
                              order by o.opened_at desc, o.id desc), '[]'::jsonb) as open_alerts
    from patient_alerts o where o.patient_id = p.id and o.status = 'open'
) a
order by p.id
