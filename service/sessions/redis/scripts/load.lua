#!lua flags=no-writes,allow-oom
-- Reads a session; not its body where the caller has that already.
-- KEYS: session   ARGV: the token of the caller's copy, or ''
local now = now_ms()
local at = redis.call('HMGET', KEYS[1], 'tok', 'exp', 'used')
if not at[1] or tonumber(at[2]) <= now then
  return {'gone', now}
end
if at[1] == ARGV[1] then
  return {'same', now, at[2], at[3]}
end
return {'found', now, record(KEYS[1])}
