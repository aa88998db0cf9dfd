-- lease seconds, attempts lost in a row that end a job (0: this one does not count), who, error as JSON or '',
-- id and attempt or '' '', 'shipped' or '' → ids of the jobs whose attempt was given up.
-- Without an id: every attempt of which a lease ran out; the error is made here. With an id and an error: that launcher
-- or trainer is known to be dead. With an id and no error: that attempt, if a lease of it ran out.
-- 'shipped': all events of the attempt are in Redis. Otherwise the job is noted in K.unshipped, and an attempt that no
-- other one follows at once is not given up before its events were shipped: an ended job's stream is complete.
local lease, most, who, failure, only, attempt, shipped = tonumber(ARGV[1]), tonumber(ARGV[2]), unpack(ARGV, 3)
local time, given_up, deaf_seconds = now(), {}, 5

-- Why an attempt is lost whose lease for this node ran out.
local function cause(id, rank)
  local current, nodes = unpack(redis.call('HMGET', K.job .. id, 'attempt', 'nodes'))
  local node, slot = '?', '?'
  for _, allocation in ipairs(decoded(nodes)) do
    if allocation.node_rank == rank then node, slot = allocation.node, allocation.slot end
  end
  if redis.call('HEXISTS', K.job .. id, 'claim:' .. current .. ':' .. rank) == 0 then
    redis.call('ZADD', K.deaf, time + deaf_seconds, slot)  -- another slot may hear better
    return {unclaimed = 'no worker of node ' .. node .. ' took attempt ' .. current}
  end
  -- a node says every few seconds that it lives: one that fell silent with its launcher may have some of its lease left
  local silent = tonumber(redis.call('ZSCORE', K.node_leases, node) or 0) < time + lease / 2
  if not silent then return {reason = 'launcher_lost', message = 'its launcher on node ' .. node .. ' was lost'} end
  redis.call('ZADD', K.node_leases, 'XX', stamp(time), node)  -- the next attempt goes elsewhere
  return {reason = 'node_lost', message = 'node ' .. node .. ' was lost'}
end

-- Whether no other attempt follows this one at once.
local function is_last(id, why)
  local status, failures = unpack(redis.call('HMGET', K.job .. id, 'status', 'failures'))
  if status == 'cancelling' or status == 'pausing' then return true end
  return not why.unclaimed and most > 0 and tonumber(failures or 0) + 1 >= most
end

local function give_up(id, why)
  local last = is_last(id, why)
  if shipped == '' and (last or not why.unclaimed) then redis.call('SADD', K.unshipped, id) end
  if shipped == '' and last then return end
  table.insert(given_up, id)
  if why.unclaimed then return conclude(id, 'recovering', who, why.unclaimed) end
  local job = K.job .. id
  local failures = redis.call('HINCRBY', job, 'failures', math.min(most, 1))
  if failures < most or most == 0 then
    -- the first time at once; what fails again and again must not keep a node busy with failing
    local pause = failures > 1 and math.min(60, 2 ^ failures) or 0
    if why.reason == 'disk_full' then pause = 20 end  -- somebody may be making space
    if why.reason == 'disk_full' and most == 0 and redis.call('EXISTS', K.events .. id) == 0 then
      redis.call('HDEL', job, 'root')  -- nothing was written there: another machine may have room
      local first = decoded(redis.call('HGET', job, 'nodes'))[1]
      if first then redis.call('ZADD', K.deaf, time + pause + deaf_seconds, first.slot) end
    end
    redis.call('HSET', job, 'not_before', stamp(time + pause))
    local later = pause > 0 and ', tried again in ' .. pause .. ' s' or ''
    conclude(id, 'recovering', who, 'attempt ' .. redis.call('HGET', job, 'attempt') .. ': ' .. why.message .. later)
  elseif conclude(id, 'failed', who, why.reason) == 'failed' then
    if most > 1 then why.message = why.message .. ', ' .. failures .. ' times in a row without a new checkpoint' end
    if why.log and #why.log == 0 then why.log = nil end  -- an empty list would be written as a map
    redis.call('HSET', job, 'error', cjson.encode(why))
  end
end

-- The node rank of a lease of this job that ran out; nil if none did.
local function expired_rank(id)
  for _, allocation in ipairs(decoded(redis.call('HGET', K.job .. id, 'nodes'))) do
    local ends = redis.call('ZSCORE', K.leases, holder(id, allocation.node_rank))
    if ends and tonumber(ends) <= time then return allocation.node_rank end
  end
end

if only ~= '' then
  local rank = failure == '' and settled(lease) and expired_rank(only)
  if holds(only, attempt) and (failure ~= '' or rank) then
    give_up(only, failure ~= '' and cjson.decode(failure) or cause(only, rank))
  end
  local current, status = unpack(redis.call('HMGET', K.job .. only, 'attempt', 'status'))
  if shipped ~= '' and current == attempt then redis.call('SREM', K.unshipped, only) end
  if TERMINAL[status] then expire_events(only) end
elseif settled(lease) then
  for _, lost in ipairs(redis.call('ZRANGEBYSCORE', K.leases, '-inf', time)) do
    local id, rank = string.match(lost, '^([^/]+)/?(%d*)$')
    if redis.call('EXISTS', K.job .. id) == 0 then  -- Redis lost its record alone, as where it evicts keys
      redis.call('ZREM', K.leases, lost)
      forget_indexes(id)
      for _, slot in ipairs(redis.call('HKEYS', K.owners)) do
        if redis.call('HGET', K.owners, slot) == id then redis.call('HDEL', K.owners, slot) end
      end
    -- an attempt that was given up for another of its leases has none any more
    elseif redis.call('ZSCORE', K.leases, lost) then give_up(id, cause(id, tonumber(rank) or 0)) end
  end
end
return given_up
