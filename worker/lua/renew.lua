-- id, attempt, node rank, lease seconds → how the attempt is to end ('' for not); false when another attempt has
-- the job. To the first node: what is desired of the job, or why a member's part broke. To the members: 'over' once
-- the first node's part has ended.
local id, attempt, rank, lease = unpack(ARGV)
if not holds(id, attempt) then return false end
local time, who = now(), holder(id, rank)
local ends = redis.call('ZSCORE', K.leases, who) or 0
-- asked several times a second; written only now and then
if ends - time < lease * 0.8 then redis.call('ZADD', K.leases, time + lease, who) end
local desired, broken, over = unpack(redis.call('HMGET', K.job .. id, 'desired', 'broken', 'over'))
if rank == '0' then return desired or broken or '' end
return over and 'over' or ''
