// Hears row changes through the unmodified supabase-js. Opened by the page, once for each identity.
// Never stops silently: every state goes to `onState`, and a channel that was closed from outside is opened again.

// All that the dashboard is made of.
const TABLES = ['vital_signs', 'patient_alerts', 'appointments', 'medications', 'care_plans', 'patients']
const AGAIN_AFTER_MS = 2_000

/**
 * `onLive` is called at each SUBSCRIBED, the first and those after a loss: whatever was read before may be old.
 * `onTrouble(text)` is called when the server says that something may be missing.
 */
export function openLive({ session, who, anonKey, onState, onLive, onChange, onTrouble }) {
  let client = null
  let ended = false

  async function open() {
    onState('connecting')
    const ours = client = globalThis.supabase.createClient(location.origin, anonKey, {
      accessToken: () => session.token(who),
    })
    // Without this the first join could carry no token yet, and would be anon's.
    await ours.realtime.setAuth()
    if (ended || client !== ours) return

    const channel = ours.channel('clinic')
    for (const table of TABLES) {
      channel.on('postgres_changes', { event: '*', schema: 'public', table }, (change) => { if (!ended) onChange(change) })
    }
    channel.on('system', {}, ({ status, message }) => { if (status === 'error' && !ended) onTrouble(message) })
    channel.subscribe((status, error) => { if (!ended && client === ours) report(status, error) })
  }

  function report(status, error) {
    if (status === 'SUBSCRIBED') {
      onState('live')
      onLive()
    } else if (status === 'CLOSED') {
      // supabase-js does not rejoin what the server closed.
      onState('closed')
      start(AGAIN_AFTER_MS)
    } else {
      onState('reconnecting', error?.message)
    }
  }

  function start(afterMs) {
    const old = client
    client = null
    if (old) leave(old)
    setTimeout(() => {
      if (ended) return
      open().catch((error) => {
        onState('reconnecting', error.message)
        start(AGAIN_AFTER_MS)
      })
    }, afterMs)
  }

  start(0)

  return {
    async close() {
      ended = true
      if (client) await leave(client)
    },
  }
}

async function leave(client) {
  await client.removeAllChannels().catch(() => {})
  client.realtime.disconnect()
}
