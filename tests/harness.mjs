// A running Walcast for the tests that look at it from outside. Called by the Node tests; as a program it runs another
// command (the Python tests) with the same things in its environment:
//   node tests/harness.mjs -- .venv/bin/python -m unittest
// Starts `walcast dev` in a directory of its own and ends exactly that process. Where WALCAST_URL is given, uses what runs
// there. Never skips: what is missing is an error that says how to get it.
import { spawn } from 'node:child_process'
import { chmod, mkdtemp, readFile, rm } from 'node:fs/promises'
import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import pg from 'pg'

const ROOT = fileURLToPath(new URL('..', import.meta.url))
const BINARY = process.env.WALCAST_BIN ?? join(ROOT, 'target/debug/walcast')
// The first `dev` of a machine may have to fetch its PostgreSQL.
const READY_WITHIN_MS = 180_000
const ENDED_WITHIN_MS = 30_000

/**
 * → { url, anonKey, serviceKey, token, databaseUrl, providerUserId, state, stop() }; `state` is null where we did not start it.
 * `token` is provider 1's. `settings` are variables such as WALCAST_SSE__COOKIE, for the one that we start.
 * What we started can also be killed, `kill9()`, its PostgreSQL with it, and started again at the same
 * address, `startAgain()`.
 */
export async function runningWalcast(settings = {}) {
  return process.env.WALCAST_URL ? given() : started(settings)
}

/** A connection that may write everything, as an application's backend does. */
export async function writer({ databaseUrl }) {
  const client = new pg.Client({ connectionString: databaseUrl })
  await client.connect()
  return client
}

function given() {
  const need = (name) => process.env[name] ?? fail(`WALCAST_URL is given, so ${name} must be too (or give neither)`)
  const token = need('WALCAST_TOKEN')
  return {
    url: process.env.WALCAST_URL.replace(/\/$/, ''),
    anonKey: need('WALCAST_ANON_KEY'),
    serviceKey: process.env.WALCAST_SERVICE_KEY,
    token,
    databaseUrl: need('WALCAST_DATABASE_URL_ADMIN'),
    providerUserId: subjectOf(token),
    state: null,
    stop: async () => {},
  }
}

async function started(settings) {
  if (!existsSync(BINARY)) fail(`${BINARY} is missing; build it with: cargo build -p walcast-server`)
  const folder = await mkdtemp(join(tmpdir(), 'walcast-test-'))
  // As root, `dev` runs its PostgreSQL as another user, who must be able to walk through this folder.
  await chmod(folder, 0o711)

  let child, said, ended
  const launch = (listen) => {
    child = spawn(BINARY, ['dev'], {
      cwd: ROOT,
      env: { ...withoutOurOwn(process.env), WALCAST_DEV_DIR: folder, WALCAST_LISTEN: listen, ...settings },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    said = tail(child)
    ended = new Promise((resolve) => child.once('exit', (code, signal) => resolve(signal ?? code)))
  }
  launch('127.0.0.1:0')

  const stop = async () => {
    if (child.exitCode === null && child.signalCode === null) child.kill('SIGTERM')
    let late = false
    const deadline = setTimeout(() => {
      late = true
      child.kill('SIGKILL')
    }, ENDED_WITHIN_MS)
    await ended
    clearTimeout(deadline)
    await rm(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 250 })
    if (late) fail(`walcast dev did not end within ${ENDED_WITHIN_MS / 1000} s of SIGTERM; it said:\n${said()}`)
  }

  try {
    const state = await stateOf(folder, ended, said)
    return {
      url: state.url.replace(/\/$/, ''),
      anonKey: state.anon_key,
      serviceKey: state.service_key,
      token: state.provider.token,
      databaseUrl: state.admin_database_url,
      providerUserId: state.provider.user_id,
      state,
      stop,
      kill9: async () => {
        child.kill('SIGKILL')
        await ended
      },
      startAgain: async () => {
        await ended
        const until = Date.now() + READY_WITHIN_MS
        // What was killed may hold its folder for a moment longer.
        for (launch(new URL(state.url).host); !(await isReady(state.url)); await after(100)) {
          if (Date.now() > until) fail(`walcast dev was not ready again within ${READY_WITHIN_MS / 1000} s; it said:\n${said()}`)
          if (child.exitCode !== null || child.signalCode !== null) launch(new URL(state.url).host)
        }
      },
    }
  } catch (error) {
    await stop().catch(() => {})
    throw error
  }
}

/** The program refuses names that it does not know, rightly; where its PostgreSQL is may be told. */
function withoutOurOwn(env) {
  return Object.fromEntries(Object.entries(env).filter(([name]) => !/^WALCAST_|^DATABASE_URL$/.test(name) || name === 'WALCAST_PG_BIN'))
}

/** Waits for the state file, which `dev` writes when it is ready. */
async function stateOf(folder, ended, said) {
  const file = join(folder, 'state.json')
  const until = Date.now() + READY_WITHIN_MS
  let over = null
  ended.then((how) => { over = { how } })
  while (Date.now() < until) {
    if (over) fail(`walcast dev ended (${over.how}) before it was ready; it said:\n${said()}`)
    const text = await readFile(file, 'utf8').catch(() => null)
    if (text) {
      try {
        return JSON.parse(text)
      } catch {
        // Caught in the middle of being written: the next look finds it whole.
      }
    }
    await after(100)
  }
  fail(`walcast dev was not ready within ${READY_WITHIN_MS / 1000} s; it said:\n${said()}`)
}

const isReady = (url) => fetch(new URL('/readyz', url)).then((answer) => answer.ok, () => false)

/** The last of what the process printed, for messages. */
function tail(child) {
  let text = ''
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8')
    stream.on('data', (chunk) => { text = (text + chunk).slice(-8_000) })
  }
  return () => text
}

export function subjectOf(token) {
  return JSON.parse(Buffer.from(token.split('.')[1], 'base64url')).sub
}

const after = (ms) => new Promise((resolve) => { setTimeout(resolve, ms) })

function fail(message) {
  throw new Error(message)
}

/** Runs the command with a Walcast of its own and answers its exit code. */
async function runWith([command, ...given]) {
  const walcast = await runningWalcast()
  try {
    const child = spawn(command, given, {
      stdio: 'inherit',
      env: {
        ...process.env,
        WALCAST_URL: walcast.url,
        WALCAST_ANON_KEY: walcast.anonKey,
        WALCAST_SERVICE_KEY: walcast.serviceKey,
        WALCAST_TOKEN: walcast.token,
        WALCAST_DATABASE_URL_ADMIN: walcast.databaseUrl,
      },
    })
    return await new Promise((resolve, reject) => {
      child.once('error', reject)
      child.once('exit', (code) => resolve(code ?? 1))
    })
  } finally {
    await walcast.stop()
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const command = process.argv.slice(process.argv.indexOf('--') + 1)
  if (!process.argv.includes('--') || command.length === 0) fail('usage: node tests/harness.mjs -- command [arguments]')
  process.exitCode = await runWith(command)
}
