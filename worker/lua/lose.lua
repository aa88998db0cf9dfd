-- lease seconds, attempts lost in a row that end a job, who, error as JSON, id and attempt or '' ''
-- → ids of the attempts given up. With an id: that launcher or trainer is known to be dead.
-- Without: every attempt whose lease ran out.
local lease, most, who, failure, only, attempt = tonumber(ARGV[1]), tonumber(ARGV[2]), unpack(ARGV, 3)
local time, lost = now(), {}
if only ~= '' then
  if holds(only, attempt) then lost = {only} end
else
  -- nobody looked for a while: Redis or every agent was away, so launchers get a full period to renew
  local last = tonumber(redis.call('GET', K.tick) or time)
  redis.call('SET', K.tick, stamp(time))
  if time - last > lease / 2 then
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.leases, '-inf', time + lease)) do
      redis.call('ZADD', K.leases, time + lease, id)
    end
  end
  lost = redis.call('ZRANGEBYSCORE', K.leases, '-inf', time)
end

for _, id in ipairs(lost) do
  local job = K.job .. id
  local current, claimed = unpack(redis.call('HMGET', job, 'attempt', 'claimed'))
  if claimed ~= current then
    conclude(id, 'recovering', who, 'no worker took attempt ' .. current)
  else
    local failures, why = redis.call('HINCRBY', job, 'failures', 1), cjson.decode(failure)
    if failures < most then
      conclude(id, 'recovering', who, 'attempt ' .. current .. ': ' .. why.message)
    elseif conclude(id, 'failed', who, why.reason) == 'failed' then
      if most > 1 then why.message = why.message .. ', ' .. failures .. ' times in a row without a new checkpoint' end
      if why.log and #why.log == 0 then why.log = nil end  -- an empty list would be written as a map
      redis.call('HSET', job, 'error', cjson.encode(why))
    end
  end
end
return lost
