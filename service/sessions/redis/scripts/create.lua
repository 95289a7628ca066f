#!lua
-- Makes a session unless its id is taken; the same create again finds the session that it made.
-- KEYS: session, expiry index, live counts, names of the principal
-- ARGV: prefix, principal/id, id, create digest, version, fingerprint, ttl ms, token, position, body, most sessions,
--   most of the principal's or ''
local session, expiry, live, names = unpack(KEYS)
local prefix, owner_and_id, id, digest, version, fingerprint, ttl, token, position, body, most, most_own = unpack(ARGV)
local now = now_ms()
local there = redis.call('HMGET', session, 'exp', 'cd')
if there[1] and tonumber(there[1]) > now then
  if there[2] == digest then
    return {'there', now, record(session)}
  end
  return {'taken', now}
end
trim(prefix, expiry, live, now, 16)
while most_own ~= '' and redis.call('ZCARD', names) >= tonumber(most_own) do
  if trim(prefix, expiry, live, now, 256) == 0 then
    return {'enough', now}
  end
end
while redis.call('ZCARD', expiry) >= tonumber(most) do
  if trim(prefix, expiry, live, now, 256) == 0 then
    return {'full', now}
  end
end
local expires = whole(now + ttl)
redis.call('DEL', session)
redis.call('HSET', session, 'ver', version, 'fp', fingerprint, 'ttl', ttl, 'cd', digest, 'made', whole(now),
  'used', whole(now), 'exp', expires, 'tok', token, 'pos', position, 'beg', '', 'dig', '', 'body', body)
redis.call('PEXPIREAT', session, expires)
-- The key may have been evicted while its place in the index stayed: then it is counted already.
if redis.call('ZADD', expiry, expires, version .. '/' .. owner_and_id) == 1 then
  redis.call('HINCRBY', live, version, 1)
end
redis.call('ZADD', names, 0, id)
return {'made', now}
