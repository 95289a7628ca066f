#!lua flags=allow-oom
-- Takes expired sessions off the indexes, so many at most; then the live ones by version.
-- KEYS: expiry index, live counts   ARGV: prefix, most
local now = now_ms()
return {'swept', now, trim(ARGV[1], KEYS[1], KEYS[2], now, tonumber(ARGV[2])), redis.call('HGETALL', KEYS[2])}
