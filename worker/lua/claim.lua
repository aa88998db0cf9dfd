-- id, attempt, node rank, boot, runs root, lease seconds → claimed | refused. A ticket starts once, and never a
-- stopped job; the same claimer may ask again. The run's files lie in that runs root from now on.
local id, attempt, rank, boot, root, lease = unpack(ARGV)
local job = K.job .. id
local claim = 'claim:' .. attempt .. ':' .. rank
local status, desired, claimed = unpack(redis.call('HMGET', job, 'status', 'desired', claim))
if not holds(id, attempt) or (claimed and claimed ~= boot) then return 'refused' end
if desired and rank ~= '0' then
  redis.call('ZREM', K.leases, holder(id, rank))  -- here nothing will run; the first node ends its own part in order
end
if desired or (status ~= 'starting' and status ~= 'running') then return 'refused' end
if root ~= '' and (redis.call('HGET', job, 'root') or root) ~= root then return 'refused' end
redis.call('HSET', job, claim, boot)
local time = now()
if rank == '0' then
  if redis.call('HSETNX', job, 'started_at', stamp(time)) == 1 then
    set_waiting(id, false)
    local created = tonumber(redis.call('HGET', job, 'created_at')) or time
    redis.call('HINCRBY', K.totals, 'started', 1)
    redis.call('HINCRBYFLOAT', K.totals, 'queue_seconds', stamp(time - created))
  end
  if root ~= '' then redis.call('HSETNX', job, 'root', root) end
end
redis.call('ZADD', K.leases, time + lease, holder(id, rank))
return 'claimed'
