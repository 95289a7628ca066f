#!lua
-- Writes one step if the session still is what the step ran on; else says what the step is to it.
-- KEYS: session, expiry index
-- ARGV: principal/id, token, position or '' where the caller gave none, digest,
--       the new token, position, begin and body
local session, expiry = unpack(KEYS)
local owner_and_id, token, position, digest, new_token, new_position, new_begin, body = unpack(ARGV)
local now = now_ms()
local at = redis.call('HMGET', session, 'tok', 'pos', 'beg', 'dig', 'exp', 'ttl', 'ver')
if not at[1] or tonumber(at[5]) <= now then
  return {'gone', now}
end
if at[1] ~= token then
  local verdict
  if position == '' or position == at[2] then
    verdict = 'run'
  elseif at[3] == '' or position ~= at[3] then
    verdict = 'mismatch'
  elseif digest == at[4] then
    verdict = 'replay'
  else
    verdict = 'conflict'
  end
  return {verdict, now, record(session)}
end
local expires = whole(now + at[6])
-- The write that a full store refuses comes first, so that nothing is half written.
redis.call('HSET', session, 'tok', new_token, 'pos', new_position, 'beg', new_begin, 'dig', digest,
  'body', body, 'used', whole(now), 'exp', expires)
redis.call('PEXPIREAT', session, expires)
redis.call('ZADD', expiry, expires, at[7] .. '/' .. owner_and_id)
return {'committed', now}
