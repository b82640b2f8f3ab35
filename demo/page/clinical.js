// The clinic's words and limits: what is a worrying reading, how severe is an alert, how a time is said.
// Used wherever readings and alerts are drawn. Says everything in words too, never by colour alone.
import { el } from './element.js'

const SEVERITIES = ['critical', 'warning', 'info']

const USUAL = {
  heart_rate: [50, 110],
  systolic: [95, 150],
  spo2: [93, 100],
  temperature_c: [35.8, 38.0],
}

/** 'low', 'high' or null. */
export function worry(reading, name) {
  const [least, most] = USUAL[name]
  if (reading[name] < least) return 'low'
  return reading[name] > most ? 'high' : null
}

/** One measured value with its unit; out of range it is marked and says so. */
export function measured(reading, name, unit, text = reading[name]) {
  const off = worry(reading, name)
  return el('span', { class: off ? 'value off' : 'value', 'data-value': name, title: off ? `${off}: outside the usual range` : null },
    el('b', {}, String(text)), el('small', {}, off ? `${unit} ${off}` : unit))
}

/** The most severe first; among equals the newest. */
export const bySeverity = (a, b) => SEVERITIES.indexOf(a.severity) - SEVERITIES.indexOf(b.severity)
  || Date.parse(b.opened_at) - Date.parse(a.opened_at)

export function alertBadge({ id, severity, message }, { short = false } = {}) {
  return el('span', { class: 'badge', 'data-severity': severity, 'data-alert-id': id, title: message },
    el('b', {}, severity), short ? null : ` ${message}`)
}

export function ago(time) {
  const seconds = Math.max(0, Math.round((Date.now() - Date.parse(time)) / 1000))
  if (seconds < 60) return `${seconds} s ago`
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86_400)} days ago`
}

export const when = (time) => new Date(time).toLocaleString(undefined, { weekday: 'short', day: 'numeric', month: 'short', hour: '2-digit', minute: '2-digit' })

export function ageInYears(born) {
  const [year, month, day] = born.split('-').map(Number)
  const now = new Date()
  const hadBirthday = now.getMonth() + 1 > month || (now.getMonth() + 1 === month && now.getDate() >= day)
  return now.getFullYear() - year - (hadBirthday ? 0 : 1)
}
