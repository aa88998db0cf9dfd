-- id, then 'look' or the record as it was archived: field, value and so on → what keeps the job in Redis: its status, the
-- id of a job that has not ended and reads it or is its child, 'unshipped', 'changed'; '' if nothing does. Without
-- 'look' the job is then removed.
local id = ARGV[1]
local job = K.job .. id
local status = redis.call('HGET', job, 'status')
if not TERMINAL[status] then return status or 'changed' end
if redis.call('SISMEMBER', K.unshipped, id) == 1 then return 'unshipped' end
for _, key in ipairs({K.readers .. id, K.index .. 'parent_job_id:' .. id}) do
  for _, other in ipairs(redis.call('ZRANGE', key, 0, -1)) do
    local state = redis.call('HGET', K.job .. other, 'status')
    if state and not TERMINAL[state] then return other end
  end
end
if ARGV[2] == 'look' then return '' end
if 2 * redis.call('HLEN', job) ~= #ARGV - 1 then return 'changed' end
for place = 2, #ARGV, 2 do
  if redis.call('HGET', job, ARGV[place]) ~= ARGV[place + 1] then return 'changed' end
end
forget_indexes(id)
redis.call('DEL', job, K.events .. id, K.changes .. id, K.children .. id, K.readers .. id)
-- a launcher that was cut off and comes back must not take the job up again
redis.call('SET', K.deleted .. id, 'archived', 'EX', 604800)
return ''
