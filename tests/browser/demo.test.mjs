// The demo page in a real browser: the ward is live, the dashboard says hit or miss truthfully, a change drops exactly what it
// must, and the patient's view holds nothing of anybody else.
// CHROMIUM names another browser; UPDATE_SCREENSHOT=1 also writes docs/demo.png.
import assert from 'node:assert/strict'
import { existsSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { after, before, beforeEach, afterEach, test } from 'node:test'
import { chromium } from 'playwright-core'
import { runningWalcast, writer } from '../harness.mjs'

const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium'
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync']
const OUT = fileURLToPath(new URL('out/', import.meta.url))
const DOCS = fileURLToPath(new URL('../../docs/', import.meta.url))
const WITHIN_MS = 30_000

let walcast, db, browser, page
let requested, complaints

before(async () => {
  if (!existsSync(CHROMIUM)) {
    throw new Error(`${CHROMIUM} is missing; install it with: apt-get install -y --no-install-recommends chromium fonts-dejavu-core`)
  }
  await mkdir(OUT, { recursive: true })
  walcast = await runningWalcast()
  db = await writer(walcast)
  browser = await chromium.launch({ executablePath: CHROMIUM, args: FLAGS })
})

after(async () => {
  await browser?.close()
  await db?.end()
  await walcast?.stop()
})

beforeEach(async () => {
  page = await browser.newPage({ viewport: { width: 1440, height: 960 } })
  page.setDefaultTimeout(WITHIN_MS)
  requested = []
  complaints = []
  page.on('request', (request) => requested.push(request.url()))
  page.on('websocket', (socket) => requested.push(socket.url()))
  page.on('pageerror', (error) => complaints.push(error.message))
  page.on('console', (line) => { if (line.type() === 'error') complaints.push(line.text()) })
  await page.goto(`${walcast.url}/demo`)
  await state('#live-state', 'live')
})

afterEach(async () => {
  const { host } = new URL(walcast.url)
  const text = await page.locator('body').innerText()
  const elsewhere = requested.filter((url) => !url.startsWith('data:') && new URL(url).host !== host)
  await page.close()
  assert.ok(requested.some((url) => url.startsWith('ws')), 'the live connection was seen, so the next line means something')
  assert.deepEqual(elsewhere, [], 'no request left the server')
  assert.deepEqual(complaints, [], 'the page ran without errors, also of its content security policy')
  assert.doesNotMatch(text, /\[object|undefined|NaN|Invalid Date/)
})

test('the ward shows the assigned patients, with readings', async () => {
  const expected = await idsOf(walcast.providerUserId)
  assert.ok(expected.length >= 20, `provider 1 has a ward, ${expected.length}`)
  await page.waitForFunction((count) => document.querySelectorAll('#ward .patient-row').length === count, expected.length)
  assert.deepEqual(await shownIds(), expected)
  assert.match(await page.locator('#ward .patient-row').first().innerText(), /\d+\s*bpm/)
})

test('a patient is computed once, then answered from the cache', async () => {
  const [, id] = await shownIds()
  // A rate that the demo's own writer never writes.
  const vital = await record(id, 179)
  // Once this was heard, no tier answers from before it: the next read must be computed.
  await page.waitForSelector(`.patient-row[data-patient-id="${id}"] [data-value="heart_rate"]:has-text("179")`)
  await choose(id)
  await page.waitForSelector('#reads li', { state: 'attached' })
  assert.equal(await page.getAttribute('#reads li', 'data-state'), 'miss')
  await page.waitForSelector(`#dashboard tr[data-vital-id="${vital}"]`)
  await page.click('#read-again')
  await page.waitForSelector('#reads li[data-state="hit"]', { state: 'attached' })
  assert.match(await page.locator('#cache-ms').innerText(), /^\d+(\.\d)? ms$/)
  await screenshot('ward')
})

test('a new reading is heard, drops the answer, and the fresh one is cached again', async () => {
  const [id] = await shownIds()
  await choose(id)
  await page.waitForSelector('#reads li[data-state="hit"]', { state: 'attached' })
  const seen = await lastRead()
  const heardBefore = Number(await page.locator('#event-count').innerText())

  // A rate that the demo's own writer never writes.
  const vital = await record(id, 181)

  await page.waitForFunction((before) => Number(document.querySelector('#event-count').textContent) > before, heardBefore)
  await page.waitForSelector(`#dashboard tr[data-vital-id="${vital}"]`)
  assert.match(await page.locator(`#dashboard tr[data-vital-id="${vital}"]`).innerText(), /181/)
  assert.match(await page.locator('#change-delay').innerText(), /^\d+ ms$/)
  assert.match(await page.locator('#changes li').first().innerText(), /^\d\d:\d\d:\d\d\s*\S/)
  // Whichever read came first after the commit, by the event or by the timer, was computed; a later one is a hit.
  await readAfter(seen, 'miss')
  await readAfter(await page.evaluate((after) => Number([...document.querySelectorAll('#reads li[data-state="miss"]')]
    .find((li) => Number(li.dataset.read) > after).dataset.read), seen), 'hit')
  if (process.env.UPDATE_SCREENSHOT === '1') await page.waitForFunction(() => document.querySelectorAll('#reads li').length >= 14, null, { timeout: 90_000 })
  await screenshot('dashboard')
})

test('an alert that opens and closes is on the ward at once', async () => {
  const [, , id] = await shownIds()
  const { rows: [{ id: alert }] } = await db.query(
    `insert into patient_alerts (patient_id, severity, kind, message) values ($1, 'critical', 'test', 'Opened by the test') returning id`, [id])
  await page.waitForSelector(`.patient-row[data-patient-id="${id}"] .badge[data-alert-id="${alert}"][data-severity="critical"]`)
  await db.query(`update patient_alerts set status = 'closed', closed_at = now() where id = $1`, [alert])
  await page.waitForSelector(`.badge[data-alert-id="${alert}"]`, { state: 'detached' })
})

test('seen as the patient, only the patient is there', async () => {
  const session = await (await fetch(`${walcast.url}/demo/session.json`)).json()
  const own = session.patient.patient_id
  const other = (await shownIds()).find((id) => id !== own)
  await choose(other)

  // The input lies invisibly over its track, as switches do.
  await page.check('#as-patient', { force: true })
  await page.waitForSelector(`#dashboard[data-patient-id="${own}"]`)
  await state('#live-state', 'live')
  assert.deepEqual(await shownIds(), [own])
  await page.waitForSelector('#denied:not([hidden])')
  assert.equal(await page.getAttribute('#denied', 'data-rows'), '0', "another's cached dashboard is not given out")

  const foreign = await record(other, 182)
  const vital = await record(own, 183)
  // Changes come in commit order: with the own one here, the other's is not coming.
  await page.waitForSelector(`#dashboard tr[data-vital-id="${vital}"]`)
  assert.equal(await page.locator(`[data-vital-id="${foreign}"]`).count(), 0)
  assert.ok(!(await page.locator('[data-value="heart_rate"]').allInnerTexts()).some((text) => text.includes('182')),
    "another patient's reading is nowhere on the page")
  assert.deepEqual(await shownIds(), [own])
  await screenshot('patient')

  await page.uncheck('#as-patient', { force: true })
  await page.waitForFunction(() => document.querySelectorAll('#ward .patient-row').length > 1)
})

test('the policy of the page lets nothing out, and no markup in', async () => {
  const policy = (await fetch(`${walcast.url}/demo`)).headers.get('content-security-policy')
  assert.match(policy, /default-src 'none'/)
  assert.doesNotMatch(policy, /unsafe|\*(?!;| |$)|https?:/)
  const refused = await page.evaluate(async () => {
    const heard = []
    document.addEventListener('securitypolicyviolation', ({ effectiveDirective }) => heard.push(effectiveDirective))
    await fetch('http://127.0.0.1:9/').catch(() => {})
    document.body.insertAdjacentHTML('beforeend', '<img src="http://127.0.0.1:9/x.png"><p style="color: red">x</p>')
    const until = performance.now() + 10_000
    while (heard.length < 3 && performance.now() < until) await new Promise(requestAnimationFrame)
    return heard.sort()
  })
  assert.deepEqual(refused, ['connect-src', 'img-src', 'style-src-attr'])
  // Asked for by the test itself.
  requested = requested.filter((url) => new URL(url).port !== '9')
  complaints = complaints.filter((text) => !/Content Security Policy/.test(text))
})

test('it is dark where the person likes it dark', async () => {
  await page.emulateMedia({ colorScheme: 'dark' })
  const [id] = await shownIds()
  await choose(id)
  await page.waitForSelector('#reads li[data-state="hit"]', { state: 'attached' })
  const luminance = (place) => page.$eval(place, (node) => {
    const [red, green, blue] = getComputedStyle(node).backgroundColor.match(/\d+/g).map(Number)
    return (red + green + blue) / 3
  })
  assert.ok(await luminance('body') < 60 && await luminance('.panel') < 60)
  await screenshot('dark')
})

test('a narrow screen needs no sideways scrolling', async () => {
  await page.setViewportSize({ width: 390, height: 844 })
  const [id] = await shownIds()
  await choose(id)
  const [needed, had] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth])
  assert.ok(needed <= had, `${needed} px in ${had} px`)
  // Who chose a patient sees the dashboard, as soon as the page has scrolled there.
  await page.waitForFunction(() => {
    const { y } = document.querySelector('#dashboard-title').getBoundingClientRect()
    return y >= 0 && y < innerHeight
  })
  await screenshot('narrow')
})

const state = (selector, value) => page.waitForSelector(`${selector}[data-state="${value}"]`)

async function choose(id) {
  await page.click(`.patient-row[data-patient-id="${id}"]`)
  await page.waitForSelector(`#dashboard[data-patient-id="${id}"]`)
}

async function shownIds() {
  await page.waitForSelector('.patient-row')
  return page.$$eval('.patient-row', (rows) => rows.map((row) => Number(row.dataset.patientId)))
}

const lastRead = () => page.$$eval('#reads li', (items) => Math.max(0, ...items.map((item) => Number(item.dataset.read))))

const readAfter = (number, wanted) => page.waitForFunction(
  ([after, kind]) => [...document.querySelectorAll(`#reads li[data-state="${kind}"]`)].some((li) => Number(li.dataset.read) > after),
  [number, wanted])

async function idsOf(providerUserId) {
  const { rows } = await db.query(
    `select a.patient_id as id from assignments a join providers d on d.id = a.provider_id
     where d.user_id = $1 and a.ended_at is null order by 1`, [providerUserId])
  return rows.map((row) => Number(row.id))
}

/** A reading of this heart rate, committed; answers its id. */
async function record(patientId, heartRate) {
  const { rows: [{ id }] } = await db.query(
    `insert into vital_signs (patient_id, heart_rate, systolic, diastolic, respiratory_rate, spo2, temperature_c)
     values ($1, $2, 121, 80, 15, 97, 36.9) returning id`, [patientId, heartRate])
  return id
}

async function screenshot(name) {
  await page.screenshot({ path: `${OUT}${name}.png` })
  if (name === 'dashboard' && process.env.UPDATE_SCREENSHOT === '1') await page.screenshot({ path: `${DOCS}demo.png` })
}
