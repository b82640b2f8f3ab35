// Unmodified supabase-js, two versions and both wire versions: it hears what it may hear, exactly, and nothing else.
import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'
import ws from 'ws'
import { runningWalcast, writer } from '../harness.mjs'
import { patientsAround, prescribe, prescription } from './clinic_rows.mjs'
import { Inbox } from './inbox.mjs'

const RUNS = [
  { pin: 'supabase-2.109', vsn: '2.0.0' },
  { pin: 'supabase-2.119', vsn: '2.0.0' },
  { pin: 'supabase-2.109', vsn: '1.0.0' },
  { pin: 'supabase-2.119', vsn: '1.0.0' },
]

let walcast, db, patients
let number = 0
// No two tests write the same name, also across runs against one server.
const unique = (what) => `${what} ${process.pid}-${number += 1}`

before(async () => {
  walcast = await runningWalcast()
  db = await writer(walcast)
  patients = await patientsAround(db, walcast.providerUserId)
})

after(async () => {
  await db?.end()
  await walcast?.stop()
})

for (const { pin, vsn } of RUNS) {
  describe(`${pin}, wire version ${vsn}`, () => {
    let createClient
    const open = []

    before(async () => {
      ({ createClient } = await import(pin))
    })

    after(async () => {
      for (const client of open) {
        await client.removeAllChannels()
        client.realtime.disconnect()
      }
    })

    async function connect(token = walcast.token) {
      const client = createClient(walcast.url, walcast.anonKey, {
        ...(token ? { accessToken: async () => token } : { auth: { persistSession: false, autoRefreshToken: false } }),
        realtime: { transport: ws, vsn },
      })
      open.push(client)
      // The first join may otherwise leave without the token.
      if (token) await client.realtime.setAuth()
      return client
    }

    /** Subscribes to `medications` and comes back when the client says SUBSCRIBED. */
    async function listen(client, { filter, event = '*' } = {}) {
      const [changes, states, system] = [new Inbox(), new Inbox(), new Inbox()]
      const channel = client.channel(unique('room'))
        .on('postgres_changes', { event, schema: 'public', table: 'medications', ...(filter ? { filter } : {}) }, changes.put)
        .on('system', {}, system.put)
        .subscribe((status, error) => states.put({ status, error: error?.message }))
      await states.find(({ status }) => status === 'SUBSCRIBED', 'SUBSCRIBED')
      return { channel, changes, states, system }
    }

    const named = (name) => (change) => change.new.name === name || change.old.name === name
    const about = (name, eventType) => (change) => named(name)(change) && change.eventType === eventType

    test('insert, update and delete arrive with their exact shapes', async () => {
      const { changes } = await listen(await connect())
      const name = unique('exact')
      const id = await prescribe(db, patients.mine, name)
      const row = prescription(id, patients.mine, name)
      assertChange(await changes.find(about(name, 'INSERT'), 'the insert'), { eventType: 'INSERT', new: row, old: {} })

      await db.query(`update medications set dose = 0.25, active = false, taken_at = '{}' where id = $1`, [id])
      const changed = { ...row, dose: 0.25, active: false, taken_at: [] }
      assertChange(await changes.find(about(name, 'UPDATE'), 'the update'), { eventType: 'UPDATE', new: changed, old: row })

      await db.query('delete from medications where id = $1', [id])
      assertChange(await changes.find(about(name, 'DELETE'), 'the delete'), { eventType: 'DELETE', new: {}, old: changed })

      assert.equal(changes.all().filter(named(name)).length, 3, 'each change once')
    })

    test('changes of one transaction arrive in its order', async () => {
      const { changes } = await listen(await connect())
      const names = Array.from({ length: 20 }, () => unique('ordered'))
      await db.query('begin')
      for (const name of names) await prescribe(db, patients.mine, name)
      await db.query('commit')
      await changes.find(about(names.at(-1), 'INSERT'), 'the last insert')
      const heard = changes.all().map((change) => change.new.name).filter((name) => names.includes(name))
      assert.deepEqual(heard, names)
    })

    test('a binding for one kind of event hears only that kind', async () => {
      const { changes } = await listen(await connect(), { event: 'UPDATE' })
      const name = unique('only updates')
      const id = await prescribe(db, patients.mine, name)
      await db.query('update medications set dose = 1 where id = $1', [id])
      await changes.find(about(name, 'UPDATE'), 'the update')
      assert.deepEqual(changes.all().filter(named(name)).map((change) => change.eventType), ['UPDATE'])
    })

    test('an eq filter lets through its own rows only', async () => {
      const { changes } = await listen(await connect(), { filter: `patient_id=eq.${patients.alsoMine}` })
      const [outside, inside] = [unique('outside'), unique('inside')]
      await prescribe(db, patients.mine, outside)
      await prescribe(db, patients.alsoMine, inside)
      // Changes come in commit order, so once the later one is here, the earlier one is not coming.
      await changes.find(about(inside, 'INSERT'), 'the row inside the filter')
      assert.deepEqual(changes.all().filter(named(outside)), [])
    })

    test("another provider's patient is never heard", async () => {
      const { changes } = await listen(await connect())
      const [foreign, own] = [unique('foreign'), unique('own')]
      const id = await prescribe(db, patients.notMine, foreign)
      await db.query('update medications set dose = 2 where id = $1', [id])
      await db.query('delete from medications where id = $1', [id])
      await prescribe(db, patients.mine, own)
      await changes.find(about(own, 'INSERT'), 'the own row')
      assert.deepEqual(changes.all().filter((change) => named(foreign)(change) || change.old.id === id), [])
    })

    test('without a signed-in user no row is heard', async () => {
      const anonymous = await connect(null)
      const changes = new Inbox()
      anonymous.channel(unique('room'))
        .on('postgres_changes', { event: '*', schema: 'public', table: 'medications' }, changes.put)
        .subscribe()
      const witness = await listen(await connect())
      const name = unique('secret')
      const id = await prescribe(db, patients.mine, name)
      await db.query('delete from medications where id = $1', [id])
      await witness.changes.find(about(name, 'DELETE'), 'the delete, by a client that may hear it')
      for (const change of changes.all()) assert.deepEqual([change.new, change.old], [{}, {}], 'an event for anon has no row')
    })

    test('after unsubscribe nothing more is heard', async () => {
      const client = await connect()
      const gone = await listen(client)
      const stays = await listen(client)
      const [earlier, later] = [unique('earlier'), unique('later')]
      await prescribe(db, patients.mine, earlier)
      await gone.changes.find(about(earlier, 'INSERT'), 'a row before unsubscribe')

      assert.equal(await gone.channel.unsubscribe(), 'ok')
      await gone.states.find(({ status }) => status === 'CLOSED', 'CLOSED')
      await prescribe(db, patients.mine, later)
      await stays.changes.find(about(later, 'INSERT'), 'the row, by the channel that stays')
      assert.deepEqual(gone.changes.all().filter(named(later)), [])
    })

    test('a filter on a column that is not there is told, not swallowed', async () => {
      const client = await connect()
      const told = new Inbox()
      const channel = client.channel(unique('room'))
        .on('postgres_changes', { event: '*', schema: 'public', table: 'medications', filter: 'no_such_column=eq.1' }, () => {})
        .on('system', {}, ({ status, message }) => told.put({ status, message }))
        .subscribe((status, error) => told.put({ status, message: error?.message ?? '' }))
      // A join error or a system error, as upstream's two ways are; it names the column.
      const error = await told.find(({ status }) => status === 'error' || status === 'CHANNEL_ERROR', 'an error')
      assert.match(error.message, /no_such_column/)
      await client.removeChannel(channel)
    })
  })
}

/** Everything of the event but its time is exactly `expected`; the time is UTC with three decimals. */
function assertChange(change, expected) {
  const { commit_timestamp: time, ...rest } = change
  assert.deepEqual(rest, { schema: 'public', table: 'medications', errors: null, ...expected })
  assert.match(time, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/)
  assert.ok(Math.abs(Date.now() - Date.parse(time)) < 60_000, `${time} is the time of the commit`)
}
