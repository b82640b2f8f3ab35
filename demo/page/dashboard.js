// The chosen patient, drawn from one row of the named query `patient_dashboard`. Called by the page with every read.
// Never asks for anything itself.
import { ageInYears, ago, alertBadge, bySeverity, measured, when } from './clinical.js'
import { el } from './element.js'
import { sparkline } from './sparkline.js'

const SHOWN_READINGS = 6

export function drawDashboard(place, row) {
  place.dataset.patientId = row.patient.id
  place.replaceChildren(person(row.patient), alerts(row.open_alerts), readings(row.vitals),
    el('div', { class: 'cards' }, appointment(row.next_appointment), medications(row.medications), carePlan(row.care_plan)))
}

/** Nothing came back: there is no such patient, or not for this caller, and nobody is told which. */
export function drawNobody(place, patientId) {
  delete place.dataset.patientId
  place.replaceChildren(el('p', { class: 'quiet' }, `No row for patient ${patientId}.`))
}

const card = (title, ...content) => el('section', { class: 'card' }, el('h3', {}, title), content)

function person(patient) {
  const facts = [`${ageInYears(patient.date_of_birth)} years`, patient.sex, `${patient.ward}, bed ${patient.bed}`, patient.mrn, `blood ${patient.blood_type}`]
  return el('div', { class: 'person' },
    el('h3', { 'data-testid': 'dashboard-name' }, patient.full_name),
    el('p', { class: 'quiet' }, facts.join(' · ')),
    patient.allergies.length ? el('p', {}, el('b', {}, 'Allergic to '), patient.allergies.join(', ')) : null)
}

function alerts(open) {
  if (!open.length) return el('p', { class: 'quiet', 'data-testid': 'dashboard-alerts' }, 'No open alerts')
  return el('p', { class: 'badges', 'data-testid': 'dashboard-alerts' }, [...open].sort(bySeverity).map((alert) => alertBadge(alert)))
}

function readings(vitals) {
  if (!vitals.length) return card('Vital signs', el('p', { class: 'quiet' }, 'No readings yet'))
  const rates = vitals.map((reading) => reading.heart_rate).reverse()
  const [latest] = vitals
  return card('Vital signs',
    el('div', { class: 'latest' },
      el('span', { class: 'big', 'data-testid': 'heart-rate' }, String(latest.heart_rate)), el('small', {}, 'bpm'),
      sparkline(rates, { width: 260, height: 56, label: `Heart rate, the last ${rates.length} readings` })),
    el('div', { class: 'scroll' }, el('table', { 'data-testid': 'readings' },
      el('thead', {}, el('tr', {}, ['When', 'Heart', 'Pressure', 'Oxygen', 'Breath', 'Temp.'].map((name) => el('th', { scope: 'col' }, name)))),
      el('tbody', {}, vitals.slice(0, SHOWN_READINGS).map(reading)))))
}

function reading(vital) {
  return el('tr', { 'data-vital-id': vital.id },
    el('th', { scope: 'row' }, ago(vital.recorded_at)),
    el('td', {}, measured(vital, 'heart_rate', '')),
    el('td', {}, measured(vital, 'systolic', '', `${vital.systolic}/${vital.diastolic}`)),
    el('td', {}, measured(vital, 'spo2', '%')),
    el('td', {}, String(vital.respiratory_rate)),
    el('td', {}, measured(vital, 'temperature_c', '', vital.temperature_c.toFixed(1))))
}

function appointment(next) {
  return card('Next appointment', next
    ? el('p', { 'data-testid': 'appointment' }, el('b', {}, next.kind), el('br'), `${when(next.starts_at)}, ${next.duration_minutes} min`, el('br'), next.room)
    : el('p', { class: 'quiet' }, 'None booked'))
}

function medications(active) {
  return card('Medications', active.length
    ? el('ul', {}, active.map((drug) => el('li', {}, el('b', {}, drug.name), ` ${drug.dose} ${drug.unit}, ${drug.taken_at.join(' and ')}`)))
    : el('p', { class: 'quiet' }, 'None'))
}

function carePlan(plan) {
  return card('Care plan', plan
    ? [el('p', {}, el('b', {}, plan.title), el('small', { class: 'quiet' }, ` review ${plan.review_on}`)),
      el('ul', {}, plan.goals.map(({ goal, done }) => el('li', {}, `${done ? '✓ done: ' : '○ open: '}${goal}`)))]
    : el('p', { class: 'quiet' }, 'None'))
}
