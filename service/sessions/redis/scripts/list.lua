#!lua flags=no-writes,allow-oom
-- One principal's live sessions by id: for each its id and its record, without the body.
-- KEYS: names of the principal   ARGV: prefix, principal, the id to start after or '', most
local now = now_ms()
local start = ARGV[3] == '' and '-' or '(' .. ARGV[3]
local found, most = {}, tonumber(ARGV[4])
while #found < most do
  local ids = redis.call('ZRANGEBYLEX', KEYS[1], start, '+', 'LIMIT', 0, most - #found)
  if #ids == 0 then
    break
  end
  for _, id in ipairs(ids) do
    local at = redis.call('HMGET', ARGV[1] .. 'session:' .. ARGV[2] .. '/' .. id,
      'ver', 'fp', 'ttl', 'cd', 'made', 'used', 'exp', 'pos')
    if at[1] and tonumber(at[7]) > now then
      found[#found + 1] = {id, at}
    end
  end
  start = '(' .. ids[#ids]
end
return {'listed', now, found}
