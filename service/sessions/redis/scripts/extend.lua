#!lua
-- Lets a session live for at least so many milliseconds from now.
-- KEYS: session, expiry index   ARGV: principal/id, milliseconds
local now = now_ms()
local at = redis.call('HMGET', KEYS[1], 'exp', 'ver')
if not at[1] or tonumber(at[1]) <= now then
  return {'gone', now}
end
if tonumber(at[1]) >= now + ARGV[2] then
  return {'enough', now, at[1]}
end
local expires = whole(now + ARGV[2])
redis.call('HSET', KEYS[1], 'exp', expires)
redis.call('PEXPIREAT', KEYS[1], expires)
redis.call('ZADD', KEYS[2], expires, at[2] .. '/' .. ARGV[1])
return {'extended', now, expires}
