// Keeps what a client heard, and waits for what it shall hear. Used by the stock client tests.
// Never sleeps: a wait ends with the event, or with a deadline that says what did come.

const WITHIN_MS = 20_000

export class Inbox {
  #heard = []
  #waiting = new Set()

  /** Pass this as the callback. */
  put = (item) => {
    this.#heard.push(item)
    for (const look of this.#waiting) look()
  }

  all() {
    return [...this.#heard]
  }

  /** The first item that fits, heard already or not yet. */
  find(fits, what) {
    return new Promise((resolve, reject) => {
      const look = () => {
        const found = this.#heard.find(fits)
        if (found === undefined) return
        clearTimeout(deadline)
        this.#waiting.delete(look)
        resolve(found)
      }
      const deadline = setTimeout(() => {
        this.#waiting.delete(look)
        reject(new Error(`did not hear ${what} within ${WITHIN_MS / 1000} s; heard: ${JSON.stringify(this.#heard)}`))
      }, WITHIN_MS)
      this.#waiting.add(look)
      look()
    })
  }
}
