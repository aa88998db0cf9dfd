-- Before every script: K names the keys, ALLOWED and TERMINAL come from worker/job.py.
-- Times are Redis's own, in seconds: one clock for all leases.

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function stamp(time) return string.format('%.6f', time) end

-- Notes that a job may have changed: whoever keeps what was read of jobs reads it again.
local function touch() redis.call('SET', K.revision, table.concat(redis.call('TIME'), '.')) end

-- Wakes the agents of a pool: there may be something to place.
local function ring(pool)
  if not pool then return end  -- of a damaged record
  redis.call('SET', K.rung .. pool, '', 'EX', 10)  -- a pass follows within that time anyway
  redis.call('PUBLISH', K.doorbell .. pool, '')
end

-- Who has a lease on a node's part in an attempt: the first node's is the attempt's own.
local function holder(id, rank) return tonumber(rank) == 0 and id or id .. '/' .. rank end

-- Whether leases mean something now. After a gap in which no agent looked (Redis or all of them away or
-- frozen, a clock that jumped, an older state restored) every lease gets a full period, and until it is
-- over nothing is given up and nothing placed: whoever still runs says so first.
local function settled(lease)
  local time = now()
  local last = tonumber(redis.call('GET', K.tick) or time)
  if math.abs(time - last) > 1 or time == last then redis.call('SET', K.tick, stamp(time)) end
  if math.abs(time - last) > lease / 2 then
    redis.call('SET', K.hold, stamp(time + lease))
    for _, who in ipairs(redis.call('ZRANGE', K.leases, 0, -1)) do redis.call('ZADD', K.leases, time + lease, who) end
    for _, node in ipairs(redis.call('ZRANGEBYSCORE', K.node_leases, time + lease, '+inf')) do
      redis.call('ZADD', K.node_leases, time + lease, node)
    end
  end
  return time >= tonumber(redis.call('GET', K.hold) or 0)
end

-- The table that a JSON text holds; an empty one for a text that is missing or damaged.
local function decoded(text)
  local readable, value = pcall(cjson.decode, text or '{}')
  return readable and type(value) == 'table' and value or {}
end

-- ---- indexes: for each value that lists filter by, a sorted set of job ids by the jobs' numbers

-- The sorted sets that list a job for as long as its record exists; its status adds one more.
local function lasting_indexes(id)
  local keys, fields = {}, {'kind', 'name', 'owner', 'parent_job_id'}
  local values = redis.call('HMGET', K.job .. id, 'labels', unpack(fields))
  for place, field in ipairs(fields) do
    if values[place + 1] then table.insert(keys, K.index .. field .. ':' .. values[place + 1]) end
  end
  for label, value in pairs(decoded(values[1])) do
    table.insert(keys, K.index .. 'label:' .. label)
    if type(value) == 'string' then table.insert(keys, K.index .. 'label:' .. label .. '=' .. value) end
  end
  return keys
end

local function number_of(id)
  return redis.call('ZSCORE', K.jobs, id) or redis.call('HGET', K.job .. id, 'number') or 0
end

-- A job that has not started counts among those of its pool that wait.
local function set_waiting(id, waits)
  local pool = redis.call('HGET', K.job .. id, 'pool')
  if waits then
    redis.call('ZADD', K.waiting .. (pool or 'default'), number_of(id), id)
    redis.call('SADD', K.pools, pool or 'default')
    return
  end
  for _, name in ipairs(pool and {pool} or redis.call('SMEMBERS', K.pools)) do
    local was_there = redis.call('ZREM', K.waiting .. name, id) == 1
    if was_there and redis.call('EXISTS', K.waiting .. name) == 0 then redis.call('SREM', K.pools, name) end
  end
end

-- Notes when a job ended: retention goes by that.
local function index_end(id, status)
  if not TERMINAL[status] then
    redis.call('ZREM', K.ended, id)
    return
  end
  redis.call('ZADD', K.ended, 'NX', redis.call('HGET', K.job .. id, 'finished_at') or stamp(now()), id)
end

-- Lists a job under its status and no other. What a job reads may not be deleted until it has ended; a run that
-- succeeded in one attempt tells how long the next one like it takes.
local function index_status(id, status)
  local number = number_of(id)
  for other in pairs(ALLOWED) do
    if other ~= status then redis.call('ZREM', K.index .. 'status:' .. other, id) end
  end
  if ALLOWED[status] then redis.call('ZADD', K.index .. 'status:' .. status, number, id) end
  local reads, likeness, attempt = unpack(redis.call('HMGET', K.job .. id, 'reads', 'likeness', 'attempt'))
  if reads and TERMINAL[status] then redis.call('ZREM', K.readers .. reads, id) end
  if reads and not TERMINAL[status] then redis.call('ZADD', K.readers .. reads, number, id) end
  if status == 'succeeded' and likeness and attempt == '1' then redis.call('ZADD', K.alike .. likeness, number, id) end
  if TERMINAL[status] then set_waiting(id, false) end
  index_end(id, status)
end

-- Lists a job, whose record is written, wherever lists look for it.
local function index_job(id)
  local number, status, started = unpack(redis.call('HMGET', K.job .. id, 'number', 'status', 'started_at'))
  number = number or number_of(id)
  redis.call('ZADD', K.jobs, number, id)
  for _, key in ipairs(lasting_indexes(id)) do redis.call('ZADD', key, number, id) end
  index_status(id, status)
  if not started and not TERMINAL[status] then set_waiting(id, true) end
end

-- Takes a job out of every index and list. Call it before the job's record is deleted: it reads the values there.
local function forget_indexes(id)
  for _, key in ipairs(lasting_indexes(id)) do redis.call('ZREM', key, id) end
  for status in pairs(ALLOWED) do redis.call('ZREM', K.index .. 'status:' .. status, id) end
  local reads, likeness = unpack(redis.call('HMGET', K.job .. id, 'reads', 'likeness'))
  if reads then redis.call('ZREM', K.readers .. reads, id) end
  if likeness then redis.call('ZREM', K.alike .. likeness, id) end
  set_waiting(id, false)
  redis.call('ZREM', K.ended, id)
  redis.call('ZREM', K.jobs, id)
end

-- The id of a job's newest event; '0-0' where there is none.
local function newest(id)
  local found = redis.call('XREVRANGE', K.events .. id, '+', '-', 'COUNT', 1)[1]
  return found and found[1] or '0-0'
end

-- Where an event stands among all of its job: exact, as no attempt has four thousand million.
local function place_of(event)
  local attempt, seq = string.match(event, '^(%d+)-(%d+)$')
  return attempt * 2 ^ 32 + seq
end

-- The fields of an entry of a stream.
local function fields_of(entry)
  local fields = {}
  for index = 1, #entry[2], 2 do fields[entry[2][index]] = entry[2][index + 1] end
  return fields
end

-- Adds a change of status to the job's stream. Its entry's id is {place of the newest event}-{number of the change}, so
-- that who was given an event or a change reads on right behind it. What happens again and again with no event between
-- (a disk that stays full, tickets that nobody takes) is kept once, and of all changes the newest thousand or so.
local function add_change(id, from, to, who, why)
  local key, behind, number = K.changes .. id, newest(id), 0
  local place = place_of(behind)
  local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 3)
  if last[1] then
    local before, last_number = string.match(last[1][1], '^(%d+)-(%d+)$')
    number = tonumber(last_number)
    if tonumber(before) > place then  -- Redis may have forgotten the events
      place, behind = tonumber(before), fields_of(last[1]).behind or behind
    end
  end
  if #last == 3 then
    local one, two, three = fields_of(last[3]), fields_of(last[2]), fields_of(last[1])
    local repeats = one.from == three.from and one.to == three.to and two.from == from and two.to == to
    if repeats and one.behind == behind then redis.call('XDEL', key, last[3][1], last[2][1]) end
  end
  local entry = string.format('%.0f-%d', place, number + 1)
  redis.call('XADD', key, 'MAXLEN', '~', 1000, entry, 'time', stamp(now()), 'from', from, 'to', to, 'who', who,
    'why', why, 'behind', behind)
end

-- Notes a change of status, and on the job how long its last recovery took.
local function note(id, from, to, who, why)
  local job, time = K.job .. id, now()
  add_change(id, from, to, who, why)
  if to == 'recovering' then redis.call('HSET', job, 'recovering_at', stamp(time)) end
  local lost_at = to == 'running' and redis.call('HGET', job, 'recovering_at')
  if lost_at then
    redis.call('HSET', job, 'recovery_seconds', time - lost_at)
  end
  if to == 'running' or to == 'paused' then redis.call('HDEL', job, 'recovering_at') end
end

-- ---- queues: K.queue has all waiting jobs of a pool in their order. Beside that each job stands in one line of those
-- that need the same (its shape), in the same order, or in the line of those that must not start yet, by when they may.

local LATER = 'later'

local function line_key(pool, name) return K.line .. pool .. '|' .. name end

-- What the jobs of a line need.
local function job_of_line(name)
  local nodes, ranks, device, root = string.match(name, '^(%d+)|(%d+)|(%w+)|(.*)$')
  return {nodes = tonumber(nodes), ranks = tonumber(ranks), device = device, root = root}
end

-- Puts a job of a queue in the line where it belongs now → the line's name; nil if it has no record or is not queued.
local function join_line(pool, id)
  local job, score = K.job .. id, redis.call('ZSCORE', K.queue .. pool, id)
  local nodes, ranks, device, root, not_before, stands = unpack(redis.call('HMGET', job,
    'wanted_nodes', 'wanted_ranks', 'wanted_device', 'root', 'not_before', 'line'))
  if not nodes or not score then return nil end
  local name = table.concat({nodes, ranks, device, root or ''}, '|')
  if tonumber(not_before or 0) > now() then name, score = LATER, not_before end
  if stands and stands ~= name then redis.call('ZREM', line_key(pool, stands), id) end
  if stands ~= name then redis.call('HSET', job, 'line', name) end
  redis.call('ZADD', line_key(pool, name), score, id)
  if name ~= LATER then redis.call('SADD', K.lines .. pool, name) end
  return name
end

-- Takes a job out of a pool's queue and its line.
local function leave_queue(pool, id)
  redis.call('ZREM', K.queue .. pool, id)
  local name = redis.call('HGET', K.job .. id, 'line')
  if name then redis.call('ZREM', line_key(pool, name), id) end
end

-- Puts a job into its pool's queue: higher priority first, then lower number.
local function enqueue(id)
  local pool, priority, number = unpack(redis.call('HMGET', K.job .. id, 'pool', 'priority', 'number'))
  local place = (tonumber(number) or number_of(id)) - (tonumber(priority) or 0) * 2 ^ 40
  redis.call('ZADD', K.queue .. (pool or 'default'), place, id)
  redis.call('HSET', K.job .. id, 'queued_at', stamp(now()))
  join_line(pool, id)
  ring(pool)
end

-- Keeps a job out of its queue until another has ended.
local function await(id, other)
  redis.call('SADD', K.children .. other, id)
  redis.call('HSET', K.job .. id, 'waits_for', other, 'status_reason', 'waits for ' .. other)
end

-- Redis forgets the events of an ended job after a month; the run directory keeps them.
local function expire_events(id) redis.call('EXPIRE', K.events .. id, 30 * 86400) end

-- Changes a job's status and says so in its stream; false where the table forbids it. Jobs that wait for
-- one that ended are queued, or cancelled with it; one that only follows it is queued either way.
local move
function move(id, to, who, why)
  local job = K.job .. id
  local from = redis.call('HGET', job, 'status') or ''
  if redis.call('EXISTS', job) == 0 then return false end
  -- a damaged record may hold a status that the table does not know: any change mends it
  if ALLOWED[from] and not ALLOWED[from][to] then return false end
  redis.call('HSET', job, 'status', to, 'status_reason', why)
  if TERMINAL[to] then redis.call('HSET', job, 'finished_at', stamp(now())) end
  index_status(id, to)
  note(id, from, to, who, why)
  if TERMINAL[to] then
    expire_events(id)
    for _, child in ipairs(redis.call('SMEMBERS', K.children .. id)) do
      local follows, status = unpack(redis.call('HMGET', K.job .. child, 'follows', 'status'))
      local before = follows and follows ~= id and redis.call('HGET', K.job .. follows, 'status')
      redis.call('HDEL', K.job .. child, 'waits_for')
      if to ~= 'succeeded' and follows ~= id then
        move(child, 'cancelled', 'scheduler', 'its parent ' .. id .. ' ' .. (to == 'failed' and 'failed' or 'was cancelled'))
      elseif before and not TERMINAL[before] and not TERMINAL[status] then
        await(child, follows)
      elseif status == 'queued' then
        redis.call('HSET', K.job .. child, 'status_reason', '')
        enqueue(child)
      end
    end
    redis.call('DEL', K.children .. id)
  end
  return true
end

-- Is this attempt the one that holds the job's lease? Everything a launcher writes asks first.
local function holds(id, attempt)
  return redis.call('HGET', K.job .. id, 'attempt') == attempt and redis.call('ZSCORE', K.leases, id)
end

-- Frees the slots that a job has, and ends its leases.
local function release(id)
  local nodes = redis.call('HGET', K.job .. id, 'nodes')
  local allocations = decoded(nodes)
  for _, allocation in ipairs(allocations) do
    redis.call('ZREM', K.leases, holder(id, allocation.node_rank))
    if redis.call('HGET', K.owners, allocation.slot) == id then redis.call('HDEL', K.owners, allocation.slot) end
  end
  if #allocations == 0 and nodes ~= '[]' then  -- the record is damaged, or the job has no slot yet
    redis.call('ZREM', K.leases, id)
    for _, slot in ipairs(redis.call('HKEYS', K.owners)) do
      if redis.call('HGET', K.owners, slot) == id then redis.call('HDEL', K.owners, slot) end
    end
  end
end

-- Ends an attempt: its slots are free, and the job is in `to`, or where a wish to stop leads instead.
local function conclude(id, to, who, why)
  local job = K.job .. id
  local status = redis.call('HGET', job, 'status')
  if status == 'cancelling' and to ~= 'succeeded' then to, why = 'cancelled', 'cancelled on request' end
  if status == 'pausing' and (to == 'queued' or to == 'recovering') then to, why = 'paused', 'paused on request' end
  if not move(id, to, who, why) then return redis.error_reply('REFUSED ' .. tostring(status) .. ' to ' .. to) end
  release(id)
  redis.call('HDEL', job, 'desired', 'eta_seconds', 'phase', 'rendezvous', 'broken')
  if to == 'queued' or to == 'recovering' then enqueue(id) end
  ring(redis.call('HGET', job, 'pool'))  -- slots are free
  return to
end
