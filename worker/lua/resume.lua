-- id, who → the status after; nil for no such job. A paused job goes back to its place in the queue.
local id, who = unpack(ARGV)
local status, parent = unpack(redis.call('HMGET', K.job .. id, 'status', 'waits_for'))
if status ~= 'paused' then return redis.call('EXISTS', K.job .. id) == 1 and (status or '') end
move(id, 'queued', who, parent and 'waits for ' .. parent or 'resumed')
if not parent then enqueue(id) end
return 'queued'
