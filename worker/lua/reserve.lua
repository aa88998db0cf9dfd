-- pool, seconds to claim a ticket, seconds after which a waiting job freezes its pool, lease seconds
-- → number of jobs placed. A job gets all its slots or none: nothing is ever held while waiting for more.
local pool, claim_seconds, freeze_seconds, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if not settled(lease) then return 0 end
local time, nodes, roots, any_free = now(), {}, {}, false
for _, node_id in ipairs(redis.call('ZRANGEBYSCORE', K.node_leases, time, '+inf')) do
  local node = cjson.decode(redis.call('HGET', K.nodes, node_id) or '{}')  -- lost alone, as where Redis evicts keys
  if node.pool == pool and redis.call('SISMEMBER', K.drained, node_id) == 0 then
    -- the smallest that fits is taken first, so that large slots stay whole
    table.sort(node.slots, function(a, b) return a.hardware.ranks < b.hardware.ranks end)
    node.free = {}
    for _, slot in ipairs(node.slots) do
      local deaf = tonumber(redis.call('ZSCORE', K.deaf, slot.id) or 0) > time
      if redis.call('HEXISTS', K.owners, slot.id) == 0 and not deaf then table.insert(node.free, slot) end
    end
    any_free = any_free or #node.free > 0
    if not roots[node.runs_root] then table.insert(roots, node.runs_root) end
    roots[node.runs_root] = true
    table.insert(nodes, node)
  end
end

-- A job wants 'cpu', 'cuda', 'auto' (the plan knew no device), or 'any' (no work for a GPU).
local function fitting(slots, job)
  for index, slot in ipairs(slots) do
    local suits = job.device == 'auto' or job.device == 'any' or job.device == slot.hardware.device
    if slot.hardware.ranks >= job.ranks and suits then
      return index
    end
  end
end

-- One of `which` ("free", or all "slots") on each of as many nodes as the job wants, or as near as that comes. The
-- nodes are of one runs root: its own, once it has files there.
local function picks_for(job, which)
  local most = {}
  for _, root in ipairs(job.root and {job.root} or roots) do
    local picks = {}
    for _, node in ipairs(nodes) do
      local index = node.runs_root == root and fitting(node[which], job)
      if index then table.insert(picks, {node = node, index = index}) end
      if #picks == job.wanted then return picks end
    end
    if #picks > #most then most = picks end
  end
  return most
end

local function place(id, picks)
  local attempt = redis.call('HINCRBY', K.job .. id, 'attempt', 1)
  local allocations = {}
  for rank, pick in ipairs(picks) do
    local slot = table.remove(pick.node.free, pick.index)
    redis.call('HSET', K.owners, slot.id, id)
    table.insert(allocations, {node = pick.node.id, slot = slot.id, node_rank = rank - 1})
    redis.call('RPUSH', K.outbox,
      cjson.encode({job_id = id, attempt = attempt, node_rank = rank - 1, slot = slot.id}))
    redis.call('ZADD', K.leases, time + claim_seconds, holder(id, rank - 1))
  end
  move(id, 'starting', 'scheduler', '')
  redis.call('HSET', K.job .. id, 'nodes', cjson.encode(allocations))
  redis.call('ZREM', K.queue .. pool, id)
end

-- Says on a waiting job what it waits for, and since when that many were free → whether this pool could run it at all.
local function explain(id, job, free)
  local live = #picks_for(job, 'slots')
  local slots = job.wanted == 1 and 'needs a slot' or 'needs a slot on each of ' .. job.wanted .. ' nodes'
  local ranks = job.ranks > 1 and ' with ' .. job.ranks .. ' ranks' or ''
  local count = live < job.wanted and live .. ' live' or free .. ' free'
  local elsewhere = job.root and #roots > (roots[job.root] and 1 or 0)
  if elsewhere and live < job.wanted then count = count .. ' with its run directory' end
  local why = slots .. ranks .. ' of pool ' .. pool .. ', ' .. count
  local other = {wanted = job.wanted, ranks = job.ranks, root = job.root, device = 'auto'}
  if live < job.wanted and #picks_for(other, 'slots') >= job.wanted then
    -- the pool could run it if the device did not matter: the one it was planned for left, or never was there
    local kind = job.device == 'cuda' and 'GPU' or 'CPU'
    why = why .. ' with a ' .. kind .. ' as planned; start such a worker, or submit the job again to plan it anew'
  end
  if string.sub(job.reason, 1, #why + 7) ~= why .. ' since ' then
    local clock = string.format('%02d:%02d', math.floor(time / 3600) % 24, math.floor(time / 60) % 60)
    redis.call('HSET', K.job .. id, 'status_reason', why .. ' since ' .. clock .. ' UTC')
  end
  return live >= job.wanted
end

-- where nothing is free, those next in line still learn why they wait
local placed = 0
for _, id in ipairs(redis.call('ZRANGE', K.queue .. pool, 0, any_free and -1 or 49)) do
  local wanted, ranks, device, queued_at, root, not_before, reason = unpack(redis.call('HMGET', K.job .. id,
    'wanted_nodes', 'wanted_ranks', 'wanted_device', 'queued_at', 'root', 'not_before', 'status_reason'))
  local job = {wanted = tonumber(wanted), ranks = tonumber(ranks), device = device, root = root, reason = reason or ''}
  if not wanted then
    redis.call('ZREM', K.queue .. pool, id)  -- Redis lost its record alone, as where it evicts keys
    forget_indexes(id)
  elseif tonumber(not_before or 0) <= time then
    local picks = picks_for(job, 'free')
    if #picks == job.wanted then
      place(id, picks)
      placed = placed + 1
    elseif explain(id, job, #picks) and time - queued_at > freeze_seconds then
      break
    end
  end
end
return placed
