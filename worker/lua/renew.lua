-- id, attempt, node rank, lease seconds → how the attempt is to end ('' for not); false when another attempt has
-- the job. To the first node: what is desired of the job, or why a member's part broke. To the members: where the ranks
-- meet once that is known, and 'over' once the first node's part has ended.
local id, attempt, rank, lease = unpack(ARGV)
if not holds(id, attempt) then return false end
local time, who = now(), holder(id, rank)
local ends = redis.call('ZSCORE', K.leases, who) or 0
-- asked several times a second; written only now and then
if ends - time < lease * 0.8 then redis.call('ZADD', K.leases, time + lease, who) end
local desired, broken, meeting = unpack(redis.call('HMGET', K.job .. id, 'desired', 'broken', 'rendezvous'))
return rank == '0' and (desired or broken or '') or meeting or ''
