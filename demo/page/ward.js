// The ward: one row for each patient that the caller may see. Filled from the named query `ward`, then kept by live changes.
// Never shows a patient of whom only a change was heard: who belongs here is for the query to say.
import { alertBadge, bySeverity, measured } from './clinical.js'
import { el } from './element.js'
import { sparkline } from './sparkline.js'

const KEPT_READINGS = 24

export class Ward {
  #list
  #summary
  #patients = new Map()
  #rows = new Map()
  #chosen = null
  #onChoose

  constructor({ list, summary, onChoose }) {
    this.#list = list
    this.#summary = summary
    this.#onChoose = onChoose
  }

  ids() {
    return [...this.#patients.keys()]
  }

  nameOf(id) {
    return this.#patients.get(id)?.full_name ?? `patient ${id}`
  }

  /** Takes the rows of the query in place of all that was known. */
  replace(rows) {
    this.#patients = new Map(rows.map((row) => [row.id, {
      ...row,
      vitals: [...row.vitals],
      alerts: new Map(row.open_alerts.map((alert) => [alert.id, alert])),
    }]))
    this.#rows = new Map(rows.map((row) => [row.id, el('li', { class: 'patient-row', 'data-patient-id': row.id, 'data-testid': 'patient-row' })]))
    this.#list.replaceChildren(...this.#rows.values())
    for (const id of this.#patients.keys()) this.#draw(id)
    this.#summarise()
  }

  clear() {
    this.replace([])
    this.#summary.textContent = ''
  }

  choose(id) {
    const before = this.#chosen
    this.#chosen = id
    if (before !== null) this.#draw(before)
    if (id !== null) this.#draw(id)
  }

  /** A live change: a reading joins its patient's line, an alert opens or closes. */
  apply({ table, eventType, new: after, old: before }) {
    const id = after.patient_id ?? before.patient_id
    const patient = this.#patients.get(id)
    if (!patient) return
    if (table === 'vital_signs') applyReading(patient, eventType, after, before)
    else if (table === 'patient_alerts') applyAlert(patient, eventType, after, before)
    else return
    this.#draw(id)
    this.#summarise()
    // Old readings that leave are housekeeping, no news.
    if (eventType !== 'DELETE') this.#flash(id)
  }

  #draw(id) {
    const row = this.#rows.get(id)
    if (!row) return
    const patient = this.#patients.get(id)
    const [latest] = patient.vitals
    const alerts = [...patient.alerts.values()].sort(bySeverity)
    const rates = patient.vitals.map((reading) => reading.heart_rate).reverse()

    // Drawn anew at each change, but the button stays: it may have the focus.
    const button = row.firstElementChild ?? row.appendChild(this.#button(id))
    button.setAttribute('aria-pressed', String(id === this.#chosen))
    button.replaceChildren(
      el('span', { class: 'who' },
        el('b', {}, patient.full_name),
        el('small', {}, `${patient.bed} · risk ${patient.risk}`)),
      sparkline(rates, { label: latest ? `Heart rate, now ${latest.heart_rate}` : 'No readings' }),
      el('span', { class: 'values' }, latest ? [
        measured(latest, 'heart_rate', 'bpm'),
        measured(latest, 'systolic', 'mmHg', `${latest.systolic}/${latest.diastolic}`),
        measured(latest, 'spo2', '% O₂'),
        measured(latest, 'temperature_c', '°C', latest.temperature_c.toFixed(1)),
      ] : 'no readings'),
      el('span', { class: 'badges' }, alerts.slice(0, 3).map((alert) => alertBadge(alert, { short: true })),
        alerts.length > 3 ? `+${alerts.length - 3}` : null),
    )
  }

  #button(id) {
    const button = el('button', { type: 'button' })
    button.addEventListener('click', () => this.#onChoose(id))
    return button
  }

  #flash(id) {
    const row = this.#rows.get(id)
    row.classList.remove('changed')
    // Reading a size makes the browser see the class gone, so that the animation starts again.
    void row.offsetWidth
    row.classList.add('changed')
  }

  #summarise() {
    const alerts = [...this.#patients.values()].flatMap((patient) => [...patient.alerts.values()])
    const critical = alerts.filter((alert) => alert.severity === 'critical').length
    const count = this.#patients.size
    this.#summary.textContent = `${count} ${count === 1 ? 'patient' : 'patients'} · ${alerts.length} open ${alerts.length === 1 ? 'alert' : 'alerts'}, ${critical} critical`
  }
}

function applyReading(patient, eventType, after, before) {
  const others = patient.vitals.filter((reading) => reading.id !== (after.id ?? before.id))
  if (eventType !== 'DELETE') others.push(after)
  others.sort((a, b) => Date.parse(b.recorded_at) - Date.parse(a.recorded_at) || b.id - a.id)
  patient.vitals = others.slice(0, KEPT_READINGS)
}

function applyAlert(patient, eventType, after, before) {
  if (eventType !== 'DELETE' && after.status === 'open') patient.alerts.set(after.id, after)
  else patient.alerts.delete(after.id ?? before.id)
}
