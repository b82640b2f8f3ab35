// Draws a few numbers as a line. Used for heart rates, oldest first. Never scales a calm line into a storm: the window is
// at least 40 beats high.
import { svg } from './element.js'

const LEAST_SPAN = 40
const EDGE = 3

export function sparkline(values, { width = 120, height = 32, label }) {
  const picture = svg('svg', { class: 'spark', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label })
  if (values.length < 2) return picture

  const middle = (Math.min(...values) + Math.max(...values)) / 2
  const span = Math.max(LEAST_SPAN, Math.max(...values) - Math.min(...values))
  const x = (i) => EDGE + (i * (width - 2 * EDGE)) / (values.length - 1)
  const y = (value) => height / 2 - ((value - middle) / span) * (height - 2 * EDGE)
  const points = values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`)
  const last = values.length - 1
  picture.append(
    svg('polyline', { points: points.join(' ') }),
    svg('circle', { cx: x(last).toFixed(1), cy: y(values[last]).toFixed(1), r: 2.5 }),
  )
  return picture
}
