-- What the scripts share. The store's clock is the only one that anything here is measured on; milliseconds.
-- Positions are compared as the decimal strings that they are stored as: a Lua number would lose int64.

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function whole(number)
  return string.format('%.0f', number)
end

-- All that makes a session, in the order that records.py reads it.
local function record(key)
  return redis.call('HMGET', key, 'ver', 'fp', 'ttl', 'cd', 'made', 'used', 'exp', 'tok', 'pos', 'beg', 'dig', 'body')
end

local function uncount(live, version)
  if redis.call('HINCRBY', live, version, -1) <= 0 then
    redis.call('HDEL', live, version)
  end
end

-- Removes up to `limit` expired sessions from the indexes; returns how many there were.
-- A member of the expiry index is model/version/principal/id; only a principal may hold a slash.
local function trim(prefix, expiry, live, now, limit)
  local members = redis.call('ZRANGEBYSCORE', expiry, '-inf', whole(now), 'LIMIT', 0, limit)
  for _, member in ipairs(members) do
    redis.call('ZREM', expiry, member)
    local version, principal, id = string.match(member, '^([^/]+/%d+)/(.*)/([^/]+)$')
    uncount(live, version)
    local expires = redis.call('HGET', prefix .. 'session:' .. principal .. '/' .. id, 'exp')
    if not expires or tonumber(expires) <= now then
      redis.call('ZREM', prefix .. 'names:' .. principal, id)
    end
  end
  return #members
end
