-- → JSON of a Census. Its cost grows with the pools that jobs wait for and with the jobs that run, not with all jobs.
local found = {statuses = {}, oldest_waiting_seconds = {}, running = {}}
local time = now()
for status in pairs(ALLOWED) do
  local count = redis.call('ZCARD', K.index .. 'status:' .. status)
  if count > 0 then found.statuses[status] = count end
end
local started, queue_seconds = unpack(redis.call('HMGET', K.totals, 'started', 'queue_seconds'))
found.started, found.queue_seconds = tonumber(started or 0), tonumber(queue_seconds or 0)
for _, pool in ipairs(redis.call('SMEMBERS', K.pools)) do
  local oldest = redis.call('ZRANGE', K.waiting .. pool, 0, 0)[1]
  local created = oldest and tonumber(redis.call('HGET', K.job .. oldest, 'created_at'))
  if created then found.oldest_waiting_seconds[pool] = time - created end
end
for _, id in ipairs(redis.call('ZRANGE', K.index .. 'status:running', 0, -1)) do
  local known = {}
  for _, name in ipairs({'tokens_per_second', 'mfu', 'train_loss', 'recovery_seconds'}) do
    known[name] = redis.call('HGET', K.job .. id, name) or nil
  end
  found.running[id] = known
end
return cjson.encode(found)
