-- id, attempt, who, lease seconds, then the job's fields as this attempt knew them → 1 where the attempt has the job
-- again; 0 where it is superseded. Redis was restored to a state from before the attempt, or knows no such job.
local id, attempt, who, lease = unpack(ARGV)
local job, time = K.job .. id, now()
local current, from = unpack(redis.call('HMGET', job, 'attempt', 'status'))
if redis.call('EXISTS', K.deleted .. id) == 1 then return 0 end
if current and (tonumber(current) >= tonumber(attempt) or TERMINAL[from]) then return 0 end
if not current then
  local number = redis.call('INCR', K.number)
  redis.call('HSET', job, unpack(ARGV, 5))
  redis.call('HSET', job, 'number', number)
end
-- no ordinary change: the table's rows were passed through before, in a history that Redis forgot
local to = (from == 'cancelling' or from == 'pausing') and from or 'running'
local why = 'attempt ' .. attempt .. ' runs and was not known'
local known = {}
for index = 5, #ARGV, 2 do known[ARGV[index]] = ARGV[index + 1] end
release(id)  -- what an earlier attempt had
redis.call('HDEL', job, 'rendezvous', 'broken')
redis.call('HSET', job, 'attempt', attempt, 'status', to, 'status_reason', why, 'nodes', known.nodes,
  'claim:' .. attempt .. ':0', who)
index_job(id)
note(id, from or '', to, who, why)
leave_queue(known.pool, id)
for _, allocation in ipairs(cjson.decode(known.nodes)) do
  redis.call('HSET', K.owners, allocation.slot, id)
  redis.call('ZADD', K.leases, time + lease, holder(id, allocation.node_rank))
end
return 1
