-- id, idempotency key or '', sha256 of the body, then the job's fields → {created|replayed|conflict|taken, id}
local id, key, sha = ARGV[1], ARGV[2], ARGV[3]
if key ~= '' then
  local held, body = unpack(redis.call('HMGET', K.idempotency .. key, 'job', 'sha256'))
  if held and redis.call('EXISTS', K.job .. held) == 1 then
    return {body == sha and 'replayed' or 'conflict', held}
  end
end
if redis.call('EXISTS', K.job .. id) == 1 then return {'taken', id} end

local time, number = stamp(now()), redis.call('INCR', K.number)
redis.call('HSET', K.job .. id, 'id', id, 'number', number, 'status', 'queued', 'attempt', 0, 'created_at', time,
  unpack(ARGV, 4))
redis.call('XADD', K.changes .. id, '*', 'time', time, 'from', '', 'to', 'queued', 'who', 'api', 'why', 'submitted')
redis.call('ZADD', K.jobs, number, id)
enqueue(id)
if key ~= '' then
  redis.call('HSET', K.idempotency .. key, 'job', id, 'sha256', sha)
  redis.call('EXPIRE', K.idempotency .. key, 86400)
end
ring()
return {'created', id}
