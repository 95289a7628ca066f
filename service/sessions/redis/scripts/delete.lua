#!lua flags=allow-oom
-- Ends a session; does nothing where there is none.
-- KEYS: session, expiry index, live counts, names of the principal   ARGV: principal/id, id
local now = now_ms()
local version = redis.call('HGET', KEYS[1], 'ver')
if version then
  redis.call('DEL', KEYS[1])
  if redis.call('ZREM', KEYS[2], version .. '/' .. ARGV[1]) == 1 then
    uncount(KEYS[3], version)
  end
  redis.call('ZREM', KEYS[4], ARGV[2])
end
return {'deleted', now}
