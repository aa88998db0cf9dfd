-- id → '' once the job's record and streams are gone, its status where it has not ended, the id of a job not ended
-- that reads its files; nil for no such job, unless it was deleted within the week: who heard no answer asks again.
-- The second argument is 'look' or '', the third 'archived' if the job's record may be in its run directory only.
-- The fourth names the runs root where the caller deletes the files; '' if it has none. Files in another root are noted:
-- a node that has that root removes them.
-- Its idempotency key stays: a request repeated late makes no new job.
local MOST_LEFTOVERS = 10000
local id, caller_root = ARGV[1], ARGV[4]
local status = redis.call('HGET', K.job .. id, 'status')
local exists = redis.call('EXISTS', K.job .. id) == 1
if not exists and ARGV[3] ~= 'archived' then return redis.call('GET', K.deleted .. id) == '' and '' end
local damaged = exists and not ALLOWED[status]
if damaged and redis.call('ZSCORE', K.leases, id) then return 'running' end
if exists and not damaged and not TERMINAL[status] then return status end
for _, other in ipairs(redis.call('ZRANGE', K.readers .. id, 0, -1)) do
  local state = redis.call('HGET', K.job .. other, 'status')
  if state and not TERMINAL[state] then return other end
end
if ARGV[2] == 'look' then return '' end
if damaged then conclude(id, 'failed', 'scheduler', 'its record is damaged') end  -- nobody waits for it any more
local root = redis.call('HGET', K.job .. id, 'root')
if root and root ~= '' and root ~= caller_root then
  redis.call('ZADD', K.leftovers .. root, stamp(now()), id)
  redis.call('ZREMRANGEBYRANK', K.leftovers .. root, 0, -MOST_LEFTOVERS - 1)  -- its nodes never came back
end
forget_indexes(id)
redis.call('DEL', K.job .. id, K.events .. id, K.changes .. id, K.children .. id, K.readers .. id)
redis.call('SET', K.deleted .. id, '', 'EX', 604800)
return ''
