-- idempotency key or '', sha256 of the body, who asks, then jobs as JSON {id, parent or '', fields}: the first and its children
-- → {created|replayed|conflict|deleted|taken, id}. A job whose parent has not ended waits for it outside the queue.
local key, sha, who = unpack(ARGV, 1, 3)
local first = cjson.decode(ARGV[4])
if key ~= '' then
  local held, body = unpack(redis.call('HMGET', K.idempotency .. key, 'job', 'sha256'))
  if held and redis.call('EXISTS', K.job .. held) == 0 then return {'deleted', held} end
  if held then return {body == sha and 'replayed' or 'conflict', held} end
end
for index = 4, #ARGV do
  if redis.call('EXISTS', K.job .. cjson.decode(ARGV[index]).id) == 1 then return {'taken', first.id} end
end

for index = 4, #ARGV do
  local made = cjson.decode(ARGV[index])
  local id, job, time = made.id, K.job .. made.id, stamp(now())
  local number = redis.call('INCR', K.number)
  redis.call('HSET', job, 'id', id, 'number', number, 'status', 'queued', 'attempt', 0, 'created_at', time,
    'queued_at', time, unpack(made.fields))
  if made.parent ~= '' then redis.call('HSET', job, 'parent_job_id', made.parent) end
  index_job(id)
  note(id, '', 'queued', who, 'submitted')
  local parent = made.parent ~= '' and redis.call('HGET', K.job .. made.parent, 'status')
  if not parent or parent == 'succeeded' then
    enqueue(id)
    redis.call('HSET', job, 'status_reason', 'waits for a worker of pool ' .. redis.call('HGET', job, 'pool'))
  elseif TERMINAL[parent] then
    move(id, 'cancelled', 'scheduler', 'its parent ' .. made.parent .. ' is ' .. parent)
  else
    await(id, made.parent)
  end
end
if key ~= '' then
  redis.call('HSET', K.idempotency .. key, 'job', first.id, 'sha256', sha)
  redis.call('EXPIRE', K.idempotency .. key, 86400)
end
return {'created', first.id}
