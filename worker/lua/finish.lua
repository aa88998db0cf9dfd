-- id, attempt, who, status, reason, then fields → the status it came to; false when another attempt has the job.
local id, attempt, who, to, why = unpack(ARGV)
if not holds(id, attempt) then return false end
if #ARGV > 5 then redis.call('HSET', K.job .. id, unpack(ARGV, 6)) end
local came_to = conclude(id, to, who, why)
-- its launcher shipped everything first; 'recovering' comes before that
if to ~= 'recovering' then redis.call('SREM', K.unshipped, id) end
return came_to
