// Reads the header Cache-Status (RFC 9211). Called with every answer of a named query. Never guesses: an answer that says
// nothing about Walcast's cache is `unknown`.

/** `walcast; hit; ttl=280` → { state: 'hit', ttl: 280 }; `walcast; fwd=miss; stored` → { state: 'miss', stored: true }. */
export function parseCacheStatus(header) {
  const unknown = { state: 'unknown', ttl: null, stored: false, detail: null }
  // Caches are listed from the origin outwards; only our own entry counts.
  const ours = (header ?? '').split(',').map((entry) => entry.split(';').map((part) => part.trim()))
    .find(([name]) => name.replaceAll('"', '').toLowerCase().startsWith('walcast'))
  if (!ours) return unknown

  const given = new Map(ours.slice(1).map((part) => {
    const [key, value = ''] = part.split('=')
    return [key.trim().toLowerCase(), value.trim().replaceAll('"', '')]
  }))
  const ttl = given.has('ttl') ? Number(given.get('ttl')) : null
  return {
    state: stateOf(given, ttl),
    ttl: Number.isFinite(ttl) ? ttl : null,
    stored: given.has('stored'),
    detail: given.get('detail') ?? null,
  }
}

function stateOf(given, ttl) {
  // RFC 9211: a hit with a negative ttl was served stale.
  if (given.has('hit')) return ttl !== null && ttl < 0 ? 'stale' : 'hit'
  const forwarded = given.get('fwd')
  if (forwarded === 'bypass') return 'bypass'
  if (forwarded) return 'miss'
  return 'unknown'
}
