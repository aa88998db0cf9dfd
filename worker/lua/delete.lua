-- id → '' once the job's record and streams are gone, its status where it has not ended, the id of a job not ended
-- that reads its files; nil for no such job, unless it was deleted within the week: who heard no answer asks again.
-- Its idempotency key stays: a request repeated late makes no new job.
local id = ARGV[1]
local status = redis.call('HGET', K.job .. id, 'status')
if not status then return redis.call('EXISTS', K.deleted .. id) == 1 and '' end
if not TERMINAL[status] then return status end
for _, other in ipairs(redis.call('ZRANGE', K.jobs, 0, -1)) do
  local state, spec = unpack(redis.call('HMGET', K.job .. other, 'status', 'spec'))
  for _, name in ipairs({'"' .. id .. '"', '"' .. id .. '/'}) do
    if state and not TERMINAL[state] and string.find(spec, name, 1, true) then return other end
  end
end
if ARGV[2] == 'look' then return '' end
redis.call('DEL', K.job .. id, K.events .. id, K.changes .. id, K.children .. id)
redis.call('ZREM', K.jobs, id)
redis.call('SET', K.deleted .. id, '', 'EX', 604800)
return ''
