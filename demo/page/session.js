// Who is looking: the provider's or the patient's token, as `walcast dev` hands them to this page (loopback only).
// Never keeps a token that is about to end: it asks for a new session first.

const ALMOST_OVER_MS = 60_000

export class Session {
  #known = null
  #asking = null

  /** { anon_key, provider, patient }; asked for once, and again when a token runs out. */
  async get() {
    if (!this.#known || this.#endsSoon()) await this.renew()
    return this.#known
  }

  /** Asks again, whatever is known; concurrent callers share one request. */
  async renew() {
    this.#asking ??= this.#ask().finally(() => { this.#asking = null })
    return this.#asking
  }

  /** `who` is 'provider' or 'patient'. */
  async token(who) {
    return (await this.get())[who].token
  }

  async #ask() {
    const answer = await fetch('/demo/session.json', { cache: 'no-store' })
    if (!answer.ok) throw new Error(`no demo session (HTTP ${answer.status}): this page works under "walcast dev"`)
    this.#known = await answer.json()
  }

  #endsSoon() {
    return [this.#known.provider, this.#known.patient].some(({ token }) => expiresAtMs(token) - Date.now() < ALMOST_OVER_MS)
  }
}

function expiresAtMs(token) {
  const claims = token.split('.')[1].replaceAll('-', '+').replaceAll('_', '/')
  return JSON.parse(atob(claims)).exp * 1000
}
