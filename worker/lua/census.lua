-- → JSON {statuses: number by status, started, queue_seconds: their sum, oldest_waiting_seconds: by pool, running: ids}
local found = {statuses = {}, oldest_waiting_seconds = {}, running = {}, started = 0, queue_seconds = 0}
local time, waiting = now(), found.oldest_waiting_seconds
for _, id in ipairs(redis.call('ZRANGE', K.jobs, 0, -1)) do
  local status, pool, created, started =
    unpack(redis.call('HMGET', K.job .. id, 'status', 'pool', 'created_at', 'started_at'))
  found.statuses[status] = (found.statuses[status] or 0) + 1
  if started then
    found.started = found.started + 1
    found.queue_seconds = found.queue_seconds + started - created
  elseif not TERMINAL[status] then
    waiting[pool] = math.max(waiting[pool] or 0, time - created)
  end
  if status == 'running' then table.insert(found.running, id) end
end
return cjson.encode(found)
