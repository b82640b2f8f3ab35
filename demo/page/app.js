// The clinic page: a provider's ward, live, and beside it one patient's dashboard from the cache.
// Loaded by index.html. Never asks any address but this server's.
import { ChangeLog } from './change_log.js'
import { drawDashboard, drawNobody } from './dashboard.js'
import { openLive } from './live.js'
import { readNamedQuery } from './named_query.js'
import { ReadLog } from './read_log.js'
import { Session } from './session.js'
import { Ward } from './ward.js'

const READ_EVERY_MS = 3_000
// As in style.css.
const SIDE_BY_SIDE = matchMedia('(min-width: 1151px)')

const $ = (id) => document.getElementById(id)
const session = new Session()
const reads = new ReadLog({
  status: $('cache-status'), ms: $('cache-ms'), age: $('cache-age'), ttl: $('cache-ttl'),
  hits: $('cache-hits'), hitsName: $('cache-hits-name'), misses: $('cache-misses'), missesName: $('cache-misses-name'),
  bars: $('reads'),
})
const changes = new ChangeLog({ delay: $('change-delay'), median: $('change-median'), list: $('changes') })
const ward = new Ward({ list: $('ward'), summary: $('ward-summary'), onChoose: chooseByHand })

let who = 'provider'
let live = null
let chosen = null
let events = 0
// Rises with each change of identity: answers that were asked for by the one before are dropped, not shown.
let turn = 0
// Changes heard while the ward is being read: its answer may be older than they are.
let heardMeanwhile = null

// One read at a time; what comes meanwhile is one more read afterwards, so that the last change is always seen.
const readWard = oneAtATime(loadWard)
const readDashboard = oneAtATime(loadDashboard)

$('read-again').addEventListener('click', () => readDashboard('button'))
$('as-patient').addEventListener('change', (event) => become(event.target.checked ? 'patient' : 'provider'))
setInterval(() => { if (chosen !== null && !document.hidden) readDashboard('timer') }, READ_EVERY_MS)
// A reload may come back with the switch as it was.
become($('as-patient').checked ? 'patient' : 'provider')

/** Starts over as somebody else: new connection, new reads, nothing of the former view stays on the screen. */
async function become(identity) {
  const mine = turn += 1
  const formerlyChosen = chosen
  const closing = live?.close()
  live = null
  who = identity
  chosen = null
  events = 0
  document.body.dataset.identity = who
  $('event-count').textContent = '0'
  $('identity').textContent = '…'
  $('denied').hidden = true
  notice(null)
  ward.choose(null)
  ward.clear()
  changes.clear()
  reads.clear()
  $('dashboard').replaceChildren()
  delete $('dashboard').dataset.patientId
  showState('connecting')

  try {
    await closing
    const known = await session.get()
    if (mine !== turn) return
    $('identity').textContent = who === 'provider' ? `${known.provider.name}, provider` : `${known.patient.name}, patient`
    live = openLive({
      session, who, anonKey: known.anon_key,
      onState: showState,
      onLive: () => { notice(null); readWard(); readDashboard('live') },
      onChange: hear,
      onTrouble: (text) => { notice(`The server says: ${text}. Read again.`); readWard(); readDashboard('live') },
    })
    await readWard()
    if (mine !== turn) return
    if (who === 'patient') {
      choose(known.patient.patient_id)
      await showDenied(formerlyChosen, known.patient.patient_id)
    } else if (chosen === null && SIDE_BY_SIDE.matches && ward.ids().length) {
      // So that both halves say at once what they are for.
      choose(ward.ids()[0])
    }
  } catch (error) {
    if (mine === turn) notice(error.message)
  }
}

function choose(patientId) {
  chosen = patientId
  ward.choose(patientId)
  reads.clear()
  readDashboard('chosen')
}

/** Where the dashboard is not beside the ward, it is brought into sight. */
function chooseByHand(patientId) {
  choose(patientId)
  if (!SIDE_BY_SIDE.matches) $('dashboard-title').scrollIntoView()
}

/** A live change: the ward takes it as it is; the chosen patient's dashboard is read anew. */
function hear(change) {
  events += 1
  $('event-count').textContent = String(events)
  const id = patientOf(change)
  changes.add(change, ward.nameOf(id))
  ward.apply(change)
  heardMeanwhile?.push(change)
  // Names, beds and who is here at all: the query says it.
  if (change.table === 'patients') readWard()
  if (id === chosen) readDashboard('change')
}

function patientOf({ table, new: after, old: before }) {
  const key = table === 'patients' ? 'id' : 'patient_id'
  return after[key] ?? before[key]
}

async function loadWard() {
  const mine = turn
  const meanwhile = heardMeanwhile = []
  const { rows } = await readNamedQuery(session, who, 'ward')
  if (mine !== turn) return
  heardMeanwhile = null
  ward.replace(rows)
  for (const change of meanwhile) ward.apply(change)
}

async function loadDashboard(cause) {
  if (chosen === null) return
  const [mine, patientId] = [turn, chosen]
  const stillWanted = () => mine === turn && patientId === chosen
  try {
    const answer = await readNamedQuery(session, who, 'patient_dashboard', { patient_id: patientId })
    if (!stillWanted()) return
    const [row] = answer.rows
    if (row) drawDashboard($('dashboard'), row)
    else drawNobody($('dashboard'), patientId)
    reads.add(answer, cause)
  } catch (error) {
    if (stillWanted()) reads.failed(error.message)
    throw error
  }
}

/** The patient asks for somebody else's dashboard as well, and the page shows what came back. */
async function showDenied(formerlyChosen, own) {
  const other = formerlyChosen !== null && formerlyChosen !== own ? formerlyChosen : own + 1
  const mine = turn
  const { rows } = await readNamedQuery(session, who, 'patient_dashboard', { patient_id: other })
  if (mine !== turn) return
  $('denied').hidden = false
  $('denied').dataset.rows = rows.length
  $('denied').textContent = rows.length === 0
    ? `Asked for patient ${other} with this token too: no row. Row security holds for cached answers as for live ones.`
    : `Patient ${other} was shown to somebody who may not see them. This is a leak: please report it.`
}

function showState(state, why = '') {
  $('live-state').dataset.state = state
  $('live-state').textContent = state
  $('live-state').title = why ?? ''
}

function notice(text) {
  $('notice').hidden = text === null
  $('notice').textContent = text ?? ''
}

/** Wraps a read so that calls during it become exactly one more, with the last caller's arguments. */
function oneAtATime(read) {
  let running = null
  let next = null
  const run = async (...given) => {
    try {
      await read(...given)
    } catch (error) {
      notice(error.message)
    }
  }
  return (...given) => {
    next = given
    running ??= (async () => {
      while (next) {
        const now = next
        next = null
        await run(...now)
      }
    })().finally(() => { running = null })
    return running
  }
}
