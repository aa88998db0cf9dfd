-- pool, seconds to claim a ticket, seconds after which a waiting job reserves its pool, lease seconds, 'due' or ''
-- → number of jobs placed. With 'due': -1 if the last pass is recent and nothing has changed since, -2 if something has
-- changed but the last pass is too recent. A job gets all its slots or none: nothing is held while it waits for more.
-- A pass looks at the first job of each line (see shared.lua), so its cost grows with the pool's nodes and with the
-- number of different shapes, not with the number of waiting jobs.
local pool, claim_seconds, freeze_seconds, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local PASS_MS = 2000  -- a pass is repeated after this time although nothing has changed
local PACE_SECONDS = 0.001  -- per node of the pool, between two passes: passes take at most a tenth of Redis's time
local MOST_TICKETS = 32  -- written by one pass
local LOOKED_AT = 50  -- jobs of a line, for one that has waited too long
local DEVICES = {auto = {'cuda', 'cpu'}, any = {'cpu', 'cuda'}}  -- in the order of preference
local time = now()

if ARGV[5] == 'due' then
  local passed = tonumber(redis.call('GET', K.passed .. pool) or nil)
  if passed and redis.call('EXISTS', K.rung .. pool) == 0 then return -1 end
  if passed and time - passed < PACE_SECONDS * redis.call('HLEN', K.offers .. pool) then return -2 end
end
if not settled(lease) then return 0 end
redis.call('SET', K.passed .. pool, stamp(time), 'PX', PASS_MS)
redis.call('DEL', K.rung .. pool)
touch()

-- ---- nodes

local roots, nodes_of = {}, {}  -- every runs root; the nodes of each
redis.call('ZREMRANGEBYSCORE', K.deaf, '-inf', stamp(time))
local is_deaf = {}
for _, slot in ipairs(redis.call('ZRANGE', K.deaf, 0, -1)) do is_deaf[slot] = true end

-- The slots of a node as classes of equal slots: device, ranks, how many there are, and the ids of the free ones.
local function classes_of(slots)
  local classes, ids, free_ranks = {}, {}, 0
  for index, slot in ipairs(slots) do ids[index] = slot[1] end
  local owners = #ids > 0 and redis.call('HMGET', K.owners, unpack(ids)) or {}
  for index, slot in ipairs(slots) do
    local id, ranks, device = unpack(slot)
    local class = classes[#classes]
    if not class or class.ranks ~= ranks or class.device ~= device then
      class = {ranks = ranks, device = device, free = {}}
      table.insert(classes, class)
    end
    if not owners[index] and not is_deaf[id] then
      table.insert(class.free, id)
      free_ranks = free_ranks + ranks
    end
  end
  return classes, free_ranks
end

local function read_nodes()
  local offers = redis.call('HGETALL', K.offers .. pool)
  for index = 1, #offers, 2 do
    local id = offers[index]
    local ends = redis.call('ZSCORE', K.node_leases, id)
    if not ends then
      redis.call('HDEL', K.offers .. pool, id)  -- the node was forgotten
    elseif tonumber(ends) > time and redis.call('SISMEMBER', K.drained, id) == 0
        and redis.call('HEXISTS', K.nodes, id) == 1 then
      local root, slots = unpack(cjson.decode(offers[index + 1]))
      if not nodes_of[root] then
        nodes_of[root] = {}
        table.insert(roots, root)
      end
      local classes, free_ranks = classes_of(slots)
      table.insert(nodes_of[root], {id = id, classes = classes, free_ranks = free_ranks})
    end
  end
end

-- The class of a node's smallest slots that suffice; with `only_free`, of which one is free.
local function fitting(node, ranks, device, only_free)
  for _, class in ipairs(node.classes) do
    if class.ranks >= ranks and class.device == device and (#class.free > 0 or not only_free) then return class end
  end
end

-- Whether slot a of the pair (node, class) is to be taken before slot b: the fewest ranks that suffice first, so that
-- large slots stay whole; then the node with the least left; then by name.
local function is_better(a, b)
  if a.class.ranks ~= b.class.ranks then return a.class.ranks < b.class.ranks end
  if a.node.free_ranks ~= b.node.free_ranks then return a.node.free_ranks < b.node.free_ranks end
  return a.node.id < b.node.id
end

-- Calls visit(pairs) with the fitting (node, class) pairs of each device and runs root that the job may use, one of
-- each node. A job runs on one device, on nodes that share their runs; where its files are, once it has any.
local function visit_choices(job, only_free, visit)
  for _, device in ipairs(DEVICES[job.device] or {job.device}) do
    for _, root in ipairs(job.root ~= '' and {job.root} or roots) do
      local found = {}
      for _, node in ipairs(nodes_of[root] or {}) do
        local class = fitting(node, job.ranks, device, only_free)
        if class then table.insert(found, {node = node, class = class}) end
      end
      if visit(found) then return end
    end
  end
end

-- The best free slots for a job, one on each of its nodes, the best of all roots; nil if there are not as many.
local function picks_for(job)
  local best, best_device
  visit_choices(job, true, function(found)
    if #found < job.nodes then return false end
    if best and found[1].class.device ~= best_device then return true end  -- a device that it prefers has room
    local picks = {found[1]}
    if job.nodes > 1 then
      table.sort(found, is_better)
      picks = {unpack(found, 1, job.nodes)}
    else
      for _, pair in ipairs(found) do
        if is_better(pair, picks[1]) then picks[1] = pair end
      end
    end
    -- the last one is the largest
    if not best or is_better(picks[#picks], best[#best]) then best, best_device = picks, picks[1].class.device end
    return false
  end)
  return best
end

-- On how many nodes a job finds a slot, at best.
local function count_nodes(job, only_free)
  local most = 0
  visit_choices(job, only_free, function(found)
    most = math.max(most, #found)
    return most >= job.nodes
  end)
  return math.min(most, job.nodes)
end

-- ---- lines

local function is_before(a, b) return a.score < b.score end

-- Redis lost the record of a waiting job alone, as where it evicts keys.
local function drop_lost(id)
  redis.call('ZREM', K.queue .. pool, id)
  if redis.call('EXISTS', K.job .. id) == 0 then forget_indexes(id) end
end

-- Finds the first job that belongs into a line; false once it is empty.
local function advance(line)
  while true do
    local id, score = unpack(redis.call('ZRANGE', line.key, 0, 0, 'WITHSCORES'))
    if not id then return false end
    local name = join_line(pool, id)
    if name == line.name then
      line.id, line.score = id, tonumber(score)
      return true
    end
    if name then  -- what it needs has changed
      ring(pool)
    else
      redis.call('ZREM', line.key, id)
      drop_lost(id)
    end
  end
end

-- Whether every job of the queue stands in one line.
local function is_lined_up()
  local standing = redis.call('ZCARD', line_key(pool, LATER))
  for _, name in ipairs(redis.call('SMEMBERS', K.lines .. pool)) do
    standing = standing + redis.call('ZCARD', line_key(pool, name))
  end
  return standing == redis.call('ZCARD', K.queue .. pool)
end

-- Puts every job of the queue in its line: a version without lines wrote the queue, or Redis lost a part of it.
local function line_up()
  for _, name in ipairs(redis.call('SMEMBERS', K.lines .. pool)) do redis.call('DEL', line_key(pool, name)) end
  redis.call('DEL', K.lines .. pool, line_key(pool, LATER))
  for _, id in ipairs(redis.call('ZRANGE', K.queue .. pool, 0, -1)) do
    if not join_line(pool, id) then drop_lost(id) end
  end
end

local function read_lines()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', line_key(pool, LATER), '-inf', stamp(time), 'LIMIT', 0, 100)) do
    if not join_line(pool, id) then redis.call('ZREM', line_key(pool, LATER), id) end
  end
  if not is_lined_up() then line_up() end
  local lines = {}
  for _, name in ipairs(redis.call('SMEMBERS', K.lines .. pool)) do
    local line = {name = name, key = line_key(pool, name), job = job_of_line(name), open = true}
    if advance(line) then
      table.insert(lines, line)
    else
      redis.call('SREM', K.lines .. pool, name)
      redis.call('HDEL', K.waits .. pool, name)
    end
  end
  return lines
end

-- ---- placement

local function place(line, picks)
  local id, allocations = line.id, {}
  local attempt = redis.call('HINCRBY', K.job .. id, 'attempt', 1)
  for index, pick in ipairs(picks) do
    local slot, rank = table.remove(pick.class.free, 1), index - 1
    pick.node.free_ranks = pick.node.free_ranks - pick.class.ranks
    redis.call('HSET', K.owners, slot, id)
    table.insert(allocations, {node = pick.node.id, slot = slot, node_rank = rank})
    -- written as worker/job.py's Ticket writes itself
    redis.call('RPUSH', K.outbox,
      string.format('{"job_id":"%s","attempt":%d,"node_rank":%d,"slot":"%s"}', id, attempt, rank, slot))
    redis.call('ZADD', K.leases, time + claim_seconds, holder(id, rank))
  end
  move(id, 'starting', 'scheduler', '')
  redis.call('HSET', K.job .. id, 'nodes', cjson.encode(allocations))
  leave_queue(pool, id)
end

-- What the jobs of a line wait for, and whether this pool could run them if nothing else ran.
local function explain(job)
  local live = count_nodes(job, false)
  local slots = job.nodes == 1 and 'needs a slot' or 'needs a slot on each of ' .. job.nodes .. ' nodes'
  local ranks = job.ranks > 1 and ' with ' .. job.ranks .. ' ranks' or ''
  local count = live < job.nodes and live .. ' live' or count_nodes(job, true) .. ' free'
  if job.root ~= '' and live < job.nodes and #roots > (nodes_of[job.root] and 1 or 0) then
    count = count .. ' with its run directory'
  end
  local why = slots .. ranks .. ' of pool ' .. pool .. ', ' .. count
  local anywhere = {nodes = job.nodes, ranks = job.ranks, root = job.root, device = 'auto'}
  if live < job.nodes and count_nodes(anywhere, false) == job.nodes then
    -- the pool could run it on another device: the one it was planned for left, or never was there
    local kind = job.device == 'cuda' and 'GPU' or 'CPU'
    why = why .. ' with a ' .. kind .. ' as planned; start such a worker, or submit the job again to plan it anew'
  end
  return why, live == job.nodes
end

-- The first job among the first of a line that has waited so long that no job after it may be placed before it.
local function overdue(line)
  local ids = redis.call('ZRANGE', line.key, 0, LOOKED_AT - 1, 'WITHSCORES')
  for index = 1, #ids, 2 do
    local queued_at = redis.call('HGET', K.job .. ids[index], 'queued_at')
    if time - tonumber(queued_at or time) > freeze_seconds then
      return {id = ids[index], score = tonumber(ids[index + 1])}
    end
  end
end

-- Writes what the jobs of each line wait for, and since when that is so.
local function write_reasons(lines, barrier)
  local known = {}
  local pairs_known = redis.call('HGETALL', K.waits .. pool)
  for index = 1, #pairs_known, 2 do known[pairs_known[index]] = pairs_known[index + 1] end
  local clock = string.format('%02d:%02d', math.floor(time / 3600) % 24, math.floor(time / 60) % 60)
  for _, line in ipairs(lines) do
    local why = line.why
    if line.open and barrier and line.score > barrier.score then
      why = 'waits for ' .. barrier.id .. ', for which pool ' .. pool .. ' is kept free'
    end
    local written = known[line.name] or ''
    if why and string.sub(written, 1, #why + 7) ~= why .. ' since ' then
      redis.call('HSET', K.waits .. pool, line.name, why .. ' since ' .. clock .. ' UTC')
    elseif not why and written ~= '' then
      redis.call('HDEL', K.waits .. pool, line.name)
    end
  end
end

read_nodes()
local lines = read_lines()
local placed, tickets, barrier = 0, 0, nil
while tickets < MOST_TICKETS do
  local line
  for _, other in ipairs(lines) do
    if other.open and (not line or is_before(other, line)) then line = other end
  end
  if not line or (barrier and line.score > barrier.score) then break end
  local picks = picks_for(line.job)
  if picks then
    place(line, picks)
    placed, tickets = placed + 1, tickets + #picks
    line.open = advance(line)
  else
    local could_run
    line.why, could_run = explain(line.job)
    line.open = false
    local late = could_run and overdue(line)
    if late and (not barrier or is_before(late, barrier)) then barrier = late end
  end
end
if tickets >= MOST_TICKETS then ring(pool) end  -- there may be more to place
write_reasons(lines, barrier)
return placed
