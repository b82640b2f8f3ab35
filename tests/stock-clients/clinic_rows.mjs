// Rows of the demo's clinic for the stock client tests: whose they are, and how to write one. Uses `medications`, which the
// demo's own writer leaves alone.

/** A patient whom the provider attends, a second one, and one whom somebody else attends. */
export async function patientsAround(db, providerUserId) {
  const { rows } = await db.query(
    `select p.id, exists (select from assignments a join providers d on d.id = a.provider_id
                          where a.patient_id = p.id and a.ended_at is null and d.user_id = $1) as ours
     from patients p order by p.id`,
    [providerUserId],
  )
  const ours = rows.filter((row) => row.ours).map((row) => Number(row.id))
  const others = rows.filter((row) => !row.ours).map((row) => Number(row.id))
  if (ours.length < 2 || others.length < 1) throw new Error(`the demo's people are missing: ${ours.length} ours, ${others.length} others`)
  return { mine: ours[0], alsoMine: ours[1], notMine: others[0] }
}

/** Writes one prescription and answers its id. Its values have one of each type that a client parses anew. */
export async function prescribe(db, patientId, name) {
  const { rows } = await db.query(
    `insert into medications (patient_id, name, dose, unit, taken_at, instructions, active, started_on, prescribed_at)
     values ($1, $2, 12.50, 'mg', '{08:00,20:00}', '{"with_food": true, "max_per_day": 2}', true, '2026-01-02',
             '2026-01-02T03:04:05.678901Z') returning id`,
    [patientId, name],
  )
  return Number(rows[0].id)
}

/** That prescription as every client must see it. */
export const prescription = (id, patientId, name) => ({
  id,
  patient_id: patientId,
  prescribed_by: null,
  name,
  dose: 12.5,
  unit: 'mg',
  taken_at: ['08:00', '20:00'],
  instructions: { with_food: true, max_per_day: 2 },
  active: true,
  started_on: '2026-01-02',
  prescribed_at: '2026-01-02T03:04:05.678901+00:00',
})

/** Writes one prescription that differs where filters look. */
export async function prescribeSo(db, { patientId, name, dose, active, startedOn }) {
  await db.query(
    `insert into medications (patient_id, name, dose, unit, taken_at, instructions, active, started_on, prescribed_at)
     values ($1, $2, $3, 'mg', '{}', '{}', $4, $5, now())`,
    [patientId, name, dose, active, startedOn],
  )
}
