// Unmodified supabase-js: every operator of a filter, `select` and wildcards. Each filter has a channel of its own; two rows are
// written, and each channel hears exactly those that its filter means.
import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'
import ws from 'ws'
import { runningWalcast, writer } from '../harness.mjs'
import { patientsAround, prescribeSo } from './clinic_rows.mjs'
import { Inbox } from './inbox.mjs'

const RUNS = [
  { pin: 'supabase-2.109', vsn: '2.0.0' },
  { pin: 'supabase-2.119', vsn: '2.0.0' },
  { pin: 'supabase-2.119', vsn: '1.0.0' },
]

let walcast, db, patients

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
    const mark = `${pin} ${vsn} ${process.pid}`
    let client

    before(async () => {
      const { createClient } = await import(pin)
      client = createClient(walcast.url, walcast.anonKey, { accessToken: async () => walcast.token, realtime: { transport: ws, vsn } })
      await client.realtime.setAuth()
    })

    after(async () => {
      await client.removeAllChannels()
      client.realtime.disconnect()
    })

    async function listen(topic, binding) {
      const [changes, states] = [new Inbox(), new Inbox()]
      const channel = client.channel(topic)
        .on('postgres_changes', { event: 'INSERT', schema: 'public', ...binding }, changes.put)
        .subscribe((status, error) => states.put({ status, error: error?.message }))
      const { status, error } = await states.find(({ status }) => status === 'SUBSCRIBED' || status === 'CHANNEL_ERROR', `an answer to ${topic}`)
      assert.equal(status, 'SUBSCRIBED', `${JSON.stringify(binding)}: ${error}`)
      return { channel, changes }
    }

    test('each filter lets through exactly the rows that it means', async () => {
      const low = { patientId: patients.mine, name: `low ${mark}`, dose: 1.5, active: false, startedOn: '2026-01-01' }
      const high = { patientId: patients.alsoMine, name: `High, (${mark})`, dose: 9.25, active: true, startedOn: '2026-06-01' }
      const cases = [
        ['dose=eq.1.50', low],
        ['dose=neq.1.5', high],
        ['dose=not.eq.1.5', high],
        ['dose=lt.9.25', low],
        ['dose=lte.1.5', low],
        ['dose=gt.1.5', high],
        ['dose=gte.9.25', high],
        ['dose=not.gte.9.25', low],
        [`patient_id=eq.${patients.mine}`, low],
        [`patient_id=in.(${patients.mine},999999)`, low],
        [`patient_id=not.in.(${patients.mine},999999)`, high],
        ['name=like.low %', low],
        ['name=not.like.low %', high],
        ['name=ilike.HIGH%', high],
        ['name=match.^low', low],
        ['name=imatch.^HIGH', high],
        ['name=not.imatch.^HIGH', low],
        ['active=is.true', high],
        ['active=is.false', low],
        ['active=not.is.true', low],
        ['prescribed_by=is.null', low, high],
        ['prescribed_by=not.is.null'],
        ['prescribed_by=isdistinct.1', low, high],
        ['prescribed_by=not.isdistinct.1'],
        ['prescribed_by=eq.1'],
        ['started_on=gte.2026-03-01', high],
        [`name=eq."${high.name}"`, high],
        [`name=in.("${high.name}","x,y")`, high],
        ['dose=gt.1,active=is.false', low],
        ['dose=gt.1,active=is.false,patient_id=eq.999999'],
        ['', low, high],
      ]
      const listeners = []
      for (const [n, [filter, ...expected]] of cases.entries()) {
        const binding = { table: 'medications', ...(filter ? { filter } : {}) }
        listeners.push({ filter, expected, ...(await listen(`filter ${n} ${mark}`, binding)) })
      }
      const last = { ...low, name: `last ${mark}` }
      for (const row of [low, high, last]) await prescribeSo(db, row)
      // The channel without a filter was joined last: on one socket, in commit order, nothing comes after its last row.
      await listeners.at(-1).changes.find((change) => change.new.name === last.name, 'the last row')
      for (const { filter, expected, changes } of listeners) {
        const heard = changes.all().map((change) => change.new.name).filter((name) => [low.name, high.name].includes(name))
        assert.deepEqual(heard, expected.map(({ name }) => name), `filter ${filter}`)
      }
      for (const { channel } of listeners) await client.removeChannel(channel)
    })

    test('select shows the columns asked for, wildcards hear every table', async () => {
      const chosen = await listen(`select ${mark}`, { table: 'medications', select: ['id', 'name'] })
      const everything = await listen(`all tables ${mark}`, { table: '*' })
      const schema = await listen(`schema ${mark}`, {})
      const row = { patientId: patients.mine, name: `selected ${mark}`, dose: 2, active: true, startedOn: '2026-02-02' }
      await prescribeSo(db, row)
      const named = (change) => change.table === 'medications' && change.new.name === row.name
      const { new: shown } = await chosen.changes.find(named, 'the row with two columns')
      assert.deepEqual(Object.keys(shown).sort(), ['id', 'name'])
      for (const { changes } of [everything, schema]) {
        assert.equal((await changes.find(named, 'the row, by a wildcard')).new.dose, 2)
      }
    })

    test('a filter that cannot be meant is told, not swallowed', async () => {
      for (const filter of ['dose=eq.many', 'dose=almost.1', 'patient_id=in.()', 'name']) {
        const told = new Inbox()
        const channel = client.channel(`wrong ${filter} ${mark}`)
          .on('postgres_changes', { event: '*', schema: 'public', table: 'medications', filter }, () => {})
          .on('system', {}, ({ status, message }) => told.put({ status, message }))
          .subscribe((status, error) => told.put({ status, message: error?.message }))
        const { message } = await told.find(({ status }) => status === 'error' || status === 'CHANNEL_ERROR', `an error for ${filter}`)
        assert.ok(message, `${filter} is refused with a reason`)
        await client.removeChannel(channel)
      }
    })
  })
}
