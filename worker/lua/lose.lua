-- lease seconds, attempts lost in a row that end a job (0: this one does not count), who, error as JSON, id and
-- attempt or '' ''
-- → ids of the attempts given up. With an id: that launcher or trainer is known to be dead.
-- Without: every attempt of which a lease ran out, the error made here.
local lease, most, who, failure, only, attempt = tonumber(ARGV[1]), tonumber(ARGV[2]), unpack(ARGV, 3)
local time, lost, order, deaf_seconds = now(), {}, {}, 5

local function expired(id, rank)
  if lost[id] then return end
  local current, nodes = unpack(redis.call('HMGET', K.job .. id, 'attempt', 'nodes'))
  local node, slot = '?', '?'
  for _, allocation in ipairs(cjson.decode(nodes or '[]')) do
    if allocation.node_rank == rank then node, slot = allocation.node, allocation.slot end
  end
  local alive = tonumber(redis.call('ZSCORE', K.node_leases, node) or 0) > time
  if redis.call('HEXISTS', K.job .. id, 'claim:' .. current .. ':' .. rank) == 0 then
    redis.call('ZADD', K.deaf, time + deaf_seconds, slot)  -- another slot may hear better
    lost[id] = {unclaimed = 'no worker of node ' .. node .. ' took attempt ' .. current}
  elseif alive then
    lost[id] = {reason = 'launcher_lost', message = 'its launcher on node ' .. node .. ' was lost'}
  else
    lost[id] = {reason = 'node_lost', message = 'node ' .. node .. ' was lost'}
  end
  table.insert(order, id)
end

if only ~= '' then
  if holds(only, attempt) then order, lost[only] = {only}, cjson.decode(failure) end
elseif settled(lease) then
  for _, who in ipairs(redis.call('ZRANGEBYSCORE', K.leases, '-inf', time)) do
    local id, rank = string.match(who, '^([^/]+)/?(%d*)$')
    expired(id, tonumber(rank) or 0)
  end
end

for _, id in ipairs(order) do
  local job, why = K.job .. id, lost[id]
  local current = redis.call('HGET', job, 'attempt')
  if why.unclaimed then
    conclude(id, 'recovering', who, why.unclaimed)
  else
    local failures = redis.call('HINCRBY', job, 'failures', math.min(most, 1))
    if failures < most or most == 0 then
      -- the first time at once; what fails again and again must not keep a node busy with failing
      local pause = failures > 1 and math.min(60, 2 ^ failures) or 0
      if why.reason == 'disk_full' then pause = 20 end  -- somebody may be making space
      if why.reason == 'disk_full' and most == 0 and redis.call('EXISTS', K.events .. id) == 0 then
        redis.call('HDEL', job, 'root')  -- nothing was written there: another machine may have room
        local taken = cjson.decode(redis.call('HGET', job, 'nodes'))[1].slot
        redis.call('ZADD', K.deaf, time + pause + deaf_seconds, taken)
      end
      redis.call('HSET', job, 'not_before', stamp(time + pause))
      local later = pause > 0 and ', tried again in ' .. pause .. ' s' or ''
      conclude(id, 'recovering', who, 'attempt ' .. current .. ': ' .. why.message .. later)
    elseif conclude(id, 'failed', who, why.reason) == 'failed' then
      if most > 1 then why.message = why.message .. ', ' .. failures .. ' times in a row without a new checkpoint' end
      if why.log and #why.log == 0 then why.log = nil end  -- an empty list would be written as a map
      redis.call('HSET', job, 'error', cjson.encode(why))
    end
  end
end
return order
