-- id, who → the status after; nil for no such job. Nothing running: cancelled at once; else `desired` is set.
local id, who = ARGV[1], ARGV[2]
local job = K.job .. id
local status, pool, attempt = unpack(redis.call('HMGET', job, 'status', 'pool', 'attempt'))
if not status then return false end
if TERMINAL[status] or status == 'cancelling' then return status end
if status == 'starting' and redis.call('HGET', job, 'claimed') ~= attempt then
  return conclude(id, 'cancelled', who, 'cancelled before it started')  -- its ticket can no longer be claimed
end
if move(id, 'cancelling', who, 'cancel requested') then
  redis.call('HSET', job, 'desired', 'cancel')
  ring()
  return 'cancelling'
end
move(id, 'cancelled', who, 'cancelled before it started')
redis.call('ZREM', K.queue .. pool, id)
return 'cancelled'
