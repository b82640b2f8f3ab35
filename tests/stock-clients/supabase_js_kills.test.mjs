// Unmodified supabase-js while the server and its PostgreSQL are killed with signal 9: every channel comes back by itself and
// hears what follows.
import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'
import ws from 'ws'
import { runningWalcast, writer } from '../harness.mjs'
import { patientsAround, prescribe } from './clinic_rows.mjs'
import { Inbox } from './inbox.mjs'

/** On one connection; the server allows a hundred. */
const CHANNELS = 90

let walcast

before(async () => {
  walcast = await runningWalcast()
  assert.ok(walcast.kill9, 'this test kills the server: it must have started it itself; unset WALCAST_URL')
})

after(async () => {
  await walcast?.stop()
})

async function write(name) {
  const db = await writer(walcast)
  try {
    await prescribe(db, (await patientsAround(db, walcast.providerUserId)).mine, name)
  } finally {
    await db.end()
  }
}

/** Our own, told by itself. */
async function postmaster() {
  const db = await writer(walcast)
  // The server is killed under this connection.
  db.on('error', () => {})
  const { rows } = await db.query(`select (regexp_match(pg_read_file('postmaster.pid'), '^[0-9]+'))[1]::int as pid`)
  await db.end()
  return rows[0].pid
}

for (const pin of ['supabase-2.109', 'supabase-2.119']) {
  describe(pin, () => {
    let client
    const listeners = []

    before(async () => {
      const { createClient } = await import(pin)
      client = createClient(walcast.url, walcast.anonKey, { accessToken: async () => walcast.token, realtime: { transport: ws } })
      await client.realtime.setAuth()
      for (let n = 0; n < CHANNELS; n += 1) {
        const [changes, states] = [new Inbox(), new Inbox()]
        client.channel(`kill ${n}`)
          .on('postgres_changes', { event: 'INSERT', schema: 'public', table: 'medications' }, changes.put)
          .subscribe((status) => states.put(status))
        listeners.push({ changes, states })
      }
      await everybodyIsBack(1)
    })

    after(async () => {
      await client.removeAllChannels()
      client.realtime.disconnect()
    })

    /** Subscribed so many times. */
    async function everybodyIsBack(times) {
      for (const { states } of listeners) {
        const often = () => states.all().filter((state) => state === 'SUBSCRIBED').length >= times
        await states.find(often, `SUBSCRIBED for the ${times}. time`)
      }
    }

    async function everybodyHears(name) {
      await write(name)
      for (const { changes } of listeners) {
        await changes.find((change) => change.new.name === name, name)
        assert.equal(changes.all().filter((change) => change.new.name === name).length, 1, `${name} once`)
      }
    }

    test('they come back after a kill of the server, and after a kill of PostgreSQL', async () => {
      await everybodyHears(`before ${pin}`)

      await walcast.kill9()
      await walcast.startAgain()
      await everybodyIsBack(2)
      await everybodyHears(`after the kill of the server ${pin}`)

      // `dev` ends with its PostgreSQL, so both are started again.
      process.kill(await postmaster(), 'SIGKILL')
      await walcast.startAgain()
      await everybodyIsBack(3)
      await everybodyHears(`after the kill of PostgreSQL ${pin}`)
    })
  })
}
