// The page reads Cache-Status as RFC 9211 writes it.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { parseCacheStatus } from '../../demo/page/cache_status.js'

const check = (header, expected) => test(`${header}`, () => {
  const { state, ttl, stored } = parseCacheStatus(header)
  assert.deepEqual({ state, ttl, stored }, { state: expected[0], ttl: expected[1], stored: expected[2] ?? false })
})

check('walcast; hit; ttl=280', ['hit', 280])
check('walcast;hit;ttl=280;detail="L1"', ['hit', 280])
check('"walcast"; hit', ['hit', null])
check('walcast; hit; ttl=-12', ['stale', -12])
check('walcast; fwd=miss; stored', ['miss', null, true])
check('walcast; fwd=stale; fwd-status=200', ['miss', null])
check('walcast; fwd=bypass; detail=volatile', ['bypass', null])
check('edge; hit; ttl=5, walcast; fwd=uri-miss; stored; ttl=300', ['miss', 300, true])
check('edge; hit', ['unknown', null])
check(null, ['unknown', null])

test('the detail is kept for the curious', () => {
  assert.equal(parseCacheStatus('walcast; fwd=miss; detail="fence"').detail, 'fence')
})
