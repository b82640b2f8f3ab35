// What was heard live, in words, and how long after its commit. Called by the page with every change.
// Never tells housekeeping: old rows that leave are no news.
import { when } from './clinical.js'
import { el } from './element.js'

const SHOWN = 3
const KEPT_DELAYS = 100

export class ChangeLog {
  #place
  #delays = []

  /** `place` has the elements delay, median and list. */
  constructor(place) {
    this.#place = place
  }

  clear() {
    this.#delays = []
    this.#place.delay.textContent = this.#place.median.textContent = '–'
    this.#place.list.replaceChildren(el('li', { class: 'quiet' }, 'Nothing yet.'))
  }

  /** `name` is the patient's; the delay compares two clocks, which are one on the machine that runs `walcast dev`. */
  add(change, name) {
    const delay = Math.max(0, Date.now() - Date.parse(change.commit_timestamp))
    this.#delays = [...this.#delays, delay].slice(-KEPT_DELAYS)
    this.#place.delay.textContent = `${delay} ms`
    this.#place.median.textContent = `${[...this.#delays].sort((a, b) => a - b)[Math.floor(this.#delays.length / 2)]} ms`

    const words = inWords(change)
    if (words === null) return
    const time = new Date(change.commit_timestamp).toLocaleTimeString(undefined, { hour12: false })
    this.#place.list.querySelector('.quiet:only-child')?.remove()
    this.#place.list.prepend(el('li', { 'data-table': change.table }, el('time', {}, time), el('b', {}, name), el('span', {}, words)))
    while (this.#place.list.children.length > SHOWN) this.#place.list.lastElementChild.remove()
  }
}

const VERBS = { INSERT: 'new', UPDATE: 'changed', DELETE: 'removed' }

function inWords({ table, eventType, new: after, old: before }) {
  if (table === 'vital_signs') return eventType === 'INSERT' ? `heart rate ${after.heart_rate}, oxygen ${after.spo2} %` : null
  if (table === 'patient_alerts') {
    if (eventType === 'DELETE') return null
    return `alert ${after.status === 'open' ? 'opened' : 'closed'}: ${after.message}`
  }
  if (table === 'appointments' && eventType === 'UPDATE') return `${after.kind} is now ${when(after.starts_at)}, ${after.room}`
  const what = { appointments: 'appointment', medications: 'medication', care_plans: 'care plan', patients: 'patient' }[table]
  const row = eventType === 'DELETE' ? before : after
  return `${what} ${VERBS[eventType]}${row.name ? `: ${row.name}` : ''}`
}
