// Where the dashboard's answers came from: hit or miss, how long, how old, and the last reads as bars.
// Called by the page with every read. Never counts a read that failed.
import { el } from './element.js'

const KEPT = 60
const SHOWN = 30
const TALLEST_MS = 20

const WORDS = { hit: 'hit', miss: 'miss', stale: 'stale', bypass: 'not cached', unknown: 'no cache status', error: 'failed', loading: 'reading', none: 'no read yet' }

export class ReadLog {
  #place
  #reads = []
  #number = 0
  #storedAtMs = null

  /** `place` has the elements status, ms, age, ttl, hits, hitsName, misses, missesName and bars. */
  constructor(place) {
    this.#place = place
  }

  /** Another patient or another identity: nothing of before compares. */
  clear() {
    this.#reads = []
    this.#storedAtMs = null
    this.#state('none')
    for (const name of ['ms', 'age', 'ttl']) this.#place[name].textContent = '–'
    this.#medians()
    this.#place.bars.replaceChildren()
  }

  /** `cause` is why it was read: chosen, change, timer, button or live. */
  add({ cache, ageSeconds, tookMs }, cause) {
    if (cache.state === 'miss') this.#storedAtMs = cache.stored ? Date.now() : null
    this.#reads.push({ number: this.#number += 1, state: cache.state, tookMs, cause })
    this.#reads = this.#reads.slice(-KEPT)

    this.#state(cache.state, cache.detail)
    this.#place.ms.textContent = milliseconds(tookMs)
    this.#place.age.textContent = this.#age(cache, ageSeconds)
    this.#place.ttl.textContent = cache.ttl === null ? '–' : `${cache.ttl} s`
    this.#medians()
    this.#place.bars.replaceChildren(...this.#reads.slice(-SHOWN).map(bar))
  }

  failed(text) {
    this.#state('error', text)
  }

  #state(state, detail = null) {
    this.#place.status.dataset.state = state
    this.#place.status.textContent = WORDS[state]
    this.#place.status.title = detail ?? ''
  }

  /** What the server says; else, for a value whose storing this page saw, the time since. */
  #age(cache, ageSeconds) {
    if (cache.state === 'miss') return 'new'
    if (ageSeconds !== null) return `${ageSeconds} s`
    return this.#storedAtMs === null ? '–' : `${Math.round((Date.now() - this.#storedAtMs) / 1000)} s`
  }

  #medians() {
    for (const [state, one, many] of [['hit', 'hit', 'hits'], ['miss', 'miss', 'misses']]) {
      const times = this.#reads.filter((read) => read.state === state).map((read) => read.tookMs).sort((a, b) => a - b)
      const count = times.length
      this.#place[`${many}Name`].textContent = count < 2 ? `${count || 'no'} ${one}` : `${count} ${many}, median`
      this.#place[many].textContent = count ? milliseconds(times[Math.floor(count / 2)]) : '–'
    }
  }
}

function bar({ number, state, tookMs, cause }) {
  const item = el('li', {
    'data-state': state, 'data-cause': cause, 'data-read': number,
    title: `${WORDS[state]}, ${milliseconds(tookMs)}, ${cause}`,
  }, el('span', { class: 'hidden' }, `${WORDS[state]} ${milliseconds(tookMs)}`))
  // Through the object model: the page's content security policy refuses style attributes.
  item.style.height = `${Math.max(12, Math.min(100, (tookMs / TALLEST_MS) * 100))}%`
  return item
}

const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`
