-- id, attempt, node rank, boot, lease seconds → claimed | refused. A ticket starts once, and never a stopped job.
local id, attempt, rank, boot, lease = unpack(ARGV)
local job = K.job .. id
local status, desired = unpack(redis.call('HMGET', job, 'status', 'desired'))
if not holds(id, attempt) or desired or (status ~= 'starting' and status ~= 'running') then return 'refused' end
if redis.call('HSETNX', job, 'claim:' .. attempt .. ':' .. rank, boot) == 0 then return 'refused' end
local time = now()
redis.call('HSET', job, 'claimed', attempt)
redis.call('HSETNX', job, 'started_at', stamp(time))
redis.call('ZADD', K.leases, time + lease, id)
return 'claimed'
