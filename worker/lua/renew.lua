-- id, attempt, lease seconds → the desired end ('' for none); false when another attempt has the job.
local id, attempt, lease = unpack(ARGV)
local ends = holds(id, attempt)
if not ends then return false end
local time = now()
-- asked several times a second; written only now and then
if ends - time < lease * 0.8 then redis.call('ZADD', K.leases, time + lease, id) end
return redis.call('HGET', K.job .. id, 'desired') or ''
