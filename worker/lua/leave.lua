-- id, attempt, node rank, why it broke or '' → nothing. A member's part of an attempt has ended and nothing of it
-- lives; one that broke ends the attempt for all.
local id, attempt, rank, why = unpack(ARGV)
if not holds(id, attempt) then return end
redis.call('ZREM', K.leases, holder(id, rank))
if why ~= '' then redis.call('HSET', K.job .. id, 'broken', 'broken: ' .. why) end
