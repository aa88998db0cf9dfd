-- → JSON of a Census
local found = {statuses = {}, oldest_waiting_seconds = {}, running = {}, started = 0, queue_seconds = 0}
local time, waiting = now(), found.oldest_waiting_seconds
for _, id in ipairs(redis.call('ZRANGE', K.jobs, 0, -1)) do
  local status, pool, created, started =
    unpack(redis.call('HMGET', K.job .. id, 'status', 'pool', 'created_at', 'started_at'))
  if status then found.statuses[status] = (found.statuses[status] or 0) + 1 end
  if started then
    found.started = found.started + 1
    found.queue_seconds = found.queue_seconds + started - created
  elseif status and not TERMINAL[status] then
    waiting[pool] = math.max(waiting[pool] or 0, time - created)
  end
  if status == 'running' then
    local known = {}
    for _, name in ipairs({'tokens_per_second', 'mfu', 'train_loss', 'recovery_seconds'}) do
      known[name] = redis.call('HGET', K.job .. id, name) or nil
    end
    found.running[id] = known
  end
end
return cjson.encode(found)
