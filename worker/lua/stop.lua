-- id, who, cancel | pause → the status after; nil for no such job. Nothing running: at once; else `desired` is set.
local id, who, word = unpack(ARGV)
local ending, ended = 'cancelling', 'cancelled'
if word == 'pause' then ending, ended = 'pausing', 'paused' end
local job = K.job .. id
local status, pool, attempt = unpack(redis.call('HMGET', job, 'status', 'pool', 'attempt'))
if redis.call('EXISTS', job) == 0 then return false end
if TERMINAL[status] or status == ending or status == ended or status == 'cancelling' then return status end
local early = ended .. ' before it started'
if status == 'starting' and redis.call('HEXISTS', job, 'claim:' .. (attempt or '') .. ':0') == 0 then
  return conclude(id, ended, who, early)  -- its ticket can no longer be claimed
end
-- under a status that the table does not know, as in a damaged record, only a lease tells whether anything runs
local may_run = ALLOWED[status] or redis.call('ZSCORE', K.leases, id)
if may_run and move(id, ending, who, word .. ' requested') then
  redis.call('HSET', job, 'desired', word)
  return ending
end
for _, name in ipairs(pool and {pool} or redis.call('SMEMBERS', K.pools)) do
  leave_queue(name, id)
  ring(name)  -- others may have waited for it to start
end
move(id, ended, who, status == 'queued' and attempt == '0' and early or word .. ' requested')
return ended
