-- pool, seconds to claim a ticket, seconds after which a waiting job freezes its pool → number of jobs placed.
-- A job gets all its slots or none: nothing is ever held while waiting for more.
local pool, claim_seconds, freeze_seconds = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time, nodes = now(), {}
for _, node_id in ipairs(redis.call('ZRANGEBYSCORE', K.node_leases, time, '+inf')) do
  local node = cjson.decode(redis.call('HGET', K.nodes, node_id))
  if node.pool == pool and node.schedulable then
    local free = {}
    for _, slot in ipairs(node.slots) do
      if redis.call('HEXISTS', K.owners, slot.id) == 0 then table.insert(free, slot) end
    end
    -- the smallest that fits is taken first, so that large slots stay whole
    table.sort(free, function(a, b) return a.hardware.ranks < b.hardware.ranks end)
    if #free > 0 then table.insert(nodes, {id = node_id, free = free}) end
  end
end

local function fitting(node, ranks, device)
  for index, slot in ipairs(node.free) do
    if slot.hardware.ranks >= ranks and (device == 'auto' or device == slot.hardware.device) then return index end
  end
end

local function place(id, wanted, ranks, device)
  local picks = {}
  for _, node in ipairs(nodes) do
    local index = #picks < wanted and fitting(node, ranks, device)
    if index then table.insert(picks, {node = node, index = index}) end
  end
  if #picks < wanted then return false end
  local attempt = redis.call('HINCRBY', K.job .. id, 'attempt', 1)
  local allocations = {}
  for rank, pick in ipairs(picks) do
    local slot = table.remove(pick.node.free, pick.index)
    redis.call('HSET', K.owners, slot.id, id)
    table.insert(allocations, {node = pick.node.id, slot = slot.id, node_rank = rank - 1})
    redis.call('RPUSH', K.outbox,
      cjson.encode({job_id = id, attempt = attempt, node_rank = rank - 1, slot = slot.id}))
  end
  move(id, 'starting', 'scheduler', '')
  redis.call('HSET', K.job .. id, 'nodes', cjson.encode(allocations))
  redis.call('ZADD', K.leases, time + claim_seconds, id)
  redis.call('ZREM', K.queue .. pool, id)
  return true
end

local placed = 0
for _, id in ipairs(#nodes > 0 and redis.call('ZRANGE', K.queue .. pool, 0, -1) or {}) do
  local wanted, ranks, device, queued_at =
    unpack(redis.call('HMGET', K.job .. id, 'wanted_nodes', 'wanted_ranks', 'wanted_device', 'queued_at'))
  if place(id, tonumber(wanted), tonumber(ranks), device) then
    placed = placed + 1
  elseif time - queued_at > freeze_seconds then
    break
  end
end
return placed
