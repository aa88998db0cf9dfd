-- id, attempt, node rank, lease seconds → how the attempt is to end ('' for not); false when another attempt has
-- the job. To the first node: what is desired of the job, or why a member's part broke. To the members: 'over' once
-- the first node's part has ended.
local id, attempt, rank, lease = unpack(ARGV)
local ends = holds(id, attempt)
if not ends then return false end
local time, zset, holder = now(), K.leases, id
if rank ~= '0' then
  zset, holder = K.members, id .. '/' .. rank
  ends = redis.call('ZSCORE', zset, holder) or 0
end
-- asked several times a second; written only now and then
if ends - time < lease * 0.8 then redis.call('ZADD', zset, time + lease, holder) end
local desired, broken, over = unpack(redis.call('HMGET', K.job .. id, 'desired', 'broken', 'over'))
if rank == '0' then return desired or broken or '' end
return over and 'over' or ''
