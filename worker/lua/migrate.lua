-- number up to which an earlier batch came or '', number of this batch's last job, then id, likeness or '' and what it
-- reads or '' of each job → 1; 0 where another process did this batch. Lists jobs that a version without indexes made,
-- and numbers their changes of status.

-- Gives the newest thousand changes of status their numbers and ids, unless they have them: see add_change.
local function number_changes(id)
  local key = K.changes .. id
  local entries, length, place = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1000), redis.call('XLEN', key), 0
  if not entries[1] then return end
  local newest_place = tonumber(string.match(entries[1][1], '^%d+'))
  if newest_place == place_of(fields_of(entries[1]).behind or '0-0') then return end
  redis.call('DEL', key)
  for index = #entries, 1, -1 do
    place = math.max(place, place_of(fields_of(entries[index]).behind or '0-0'))
    redis.call('XADD', key, string.format('%.0f-%d', place, length - index + 1), unpack(entries[index][2]))
  end
end

if redis.call('HGET', K.schema, 'migrated_to') ~= ARGV[1] then return 0 end
for place = 3, #ARGV, 3 do
  local id, likeness, reads = unpack(ARGV, place, place + 2)
  local job = K.job .. id
  number_changes(id)
  local created, started = unpack(redis.call('HMGET', job, 'created_at', 'started_at'))
  -- a job that has an owner was made by a version that lists it
  if redis.call('EXISTS', job) == 1 and redis.call('HSETNX', job, 'owner', 'local') == 1 then
    if likeness ~= '' then redis.call('HSET', job, 'likeness', likeness) end
    if reads ~= '' then redis.call('HSET', job, 'reads', reads) end
    index_job(id)
    started, created = tonumber(started), tonumber(created)
    if started and created then
      redis.call('HINCRBY', K.totals, 'started', 1)
      redis.call('HINCRBYFLOAT', K.totals, 'queue_seconds', stamp(started - created))
    end
  end
  index_end(id, redis.call('HGET', job, 'status'))
end
redis.call('HSET', K.schema, 'migrated_to', ARGV[2])
return 1
