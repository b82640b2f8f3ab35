// Runs a named query and says where the answer came from. Called by the page for the ward and the dashboard.
// Never lets the browser's own cache answer: what is measured is Walcast's.
import { parseCacheStatus } from './cache_status.js'

/** → { rows, cache: { state, ttl, stored, detail }, ageSeconds, tookMs } */
export async function readNamedQuery(session, who, name, parameters = {}) {
  const query = new URLSearchParams(parameters)
  const ask = async () => fetch(`/query/v1/${name}?${query}`, {
    cache: 'no-store',
    headers: { authorization: `Bearer ${await session.token(who)}`, accept: 'application/json' },
  }).catch(() => { throw new Error('The server does not answer. What is shown is from before; it is asked again.') })
  await session.get()

  let began = performance.now()
  let answer = await ask()
  if (answer.status === 401) {
    // The server was started anew with other keys: one new session, one more try.
    await session.renew()
    began = performance.now()
    answer = await ask()
  }
  if (!answer.ok) throw new Error(await problemOf(name, answer))
  const rows = await answer.json()
  const tookMs = performance.now() - began

  const age = answer.headers.get('age')
  return {
    rows,
    cache: parseCacheStatus(answer.headers.get('cache-status')),
    ageSeconds: age === null ? null : Number(age),
    tookMs,
  }
}

/** RFC 9457: the title says what, the hint says how to mend. */
async function problemOf(name, answer) {
  const problem = await answer.json().catch(() => ({}))
  const what = problem.detail ?? problem.title ?? `HTTP ${answer.status}`
  return `query ${name}: ${what}${problem.hint ? ` (${problem.hint})` : ''}`
}
