// A browser's own EventSource, which can set no header: through a ticket, and through a cookie from a page of another origin.
import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import { after, before, test } from 'node:test'
import { chromium } from 'playwright-core'
import { runningWalcast } from '../harness.mjs'

const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium'
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync']
const RESOURCE = '/sse/v1/changes?table=vital_signs'

let walcast, browser, allowed, stranger

/** A page of nobody's, at an origin of its own. */
async function page() {
  const server = createServer((_, answer) => answer.writeHead(200, { 'content-type': 'text/html' }).end('<title>page</title>'))
  await new Promise((resolve) => { server.listen(0, '127.0.0.1', resolve) })
  return { origin: `http://127.0.0.1:${server.address().port}`, stop: () => server.close() }
}

before(async () => {
  allowed = await page()
  stranger = await page()
  walcast = await runningWalcast({ WALCAST_SSE__COOKIE: 'token', WALCAST_SERVER__ALLOWED_ORIGINS: allowed.origin })
  browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS })
})

after(async () => {
  await browser?.close()
  allowed?.stop()
  stranger?.stop()
  await walcast?.stop()
})

/** In the page: the names of the events until the first change, or `refused`. */
async function heard({ url, credentials }) {
  const events = new EventSource(url, { withCredentials: credentials })
  const names = []
  return new Promise((resolve) => {
    const end = (name) => {
      names.push(name)
      events.close()
      resolve(names)
    }
    for (const name of ['live', 'resumed', 'resync']) events.addEventListener(name, () => names.push(name))
    events.addEventListener('change', (event) => end(JSON.parse(event.data).table))
    events.onerror = () => { if (events.readyState === EventSource.CLOSED) end('refused') }
  })
}

test('a ticket opens a stream for EventSource, from whatever page', async () => {
  const context = await browser.newContext()
  const there = await context.newPage()
  await there.goto(stranger.origin)
  const ticket = await there.evaluate(async ({ url, token, resource }) => {
    const answer = await fetch(`${url}/sse/v1/ticket`, {
      method: 'POST',
      headers: { Authorization: `Bearer ${token}` },
      body: JSON.stringify({ resource }),
    })
    return answer.json()
  }, { url: walcast.url, token: walcast.token, resource: RESOURCE })
  assert.deepEqual(await there.evaluate(heard, { url: walcast.url + ticket.url, credentials: false }), ['live', 'vital_signs'])
  const other = walcast.url + ticket.url.replace('vital_signs', 'patients')
  assert.deepEqual(await there.evaluate(heard, { url: other, credentials: false }), ['refused'])
  await context.close()
})

test('a cookie opens a stream for pages of this origin and of allowed ones, and for no others', async () => {
  const context = await browser.newContext()
  await context.addCookies([{ name: 'token', value: walcast.token, url: walcast.url }])
  const there = await context.newPage()
  const url = walcast.url + RESOURCE
  for (const [origin, credentials, expected] of [
    [allowed.origin, true, ['live', 'vital_signs']],
    [walcast.url, false, ['live', 'vital_signs']],
    [stranger.origin, true, ['refused']],
    [allowed.origin, false, ['refused']],
  ]) {
    await there.goto(origin)
    assert.deepEqual(await there.evaluate(heard, { url, credentials }), expected, `${origin}, credentials ${credentials}`)
  }
  await context.close()
})
