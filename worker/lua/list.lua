-- below which number ('+inf' or '(number'), most, filters as JSON {status, kind, name, parent_job_id, label, value},
-- those wanted → ids and numbers of the jobs that fit, newest first. Here and not by many questions: twelve
-- thousand take one.
local below, most, filters = ARGV[1], tonumber(ARGV[2]), cjson.decode(ARGV[3])
local fields = {'status', 'kind', 'name', 'parent_job_id'}

local function fits(id)
  for _, field in ipairs(fields) do
    if filters[field] and redis.call('HGET', K.job .. id, field) ~= filters[field] then return false end
  end
  if not filters.label then return true end
  local labels = redis.call('HGET', K.job .. id, 'labels')
  if not (labels and string.find(labels, filters.label, 1, true)) then return false end
  local value = cjson.decode(labels)[filters.label]
  return value and (not filters.value or filters.value == value)
end

local found = {}
while true do
  local batch = redis.call('ZREVRANGEBYSCORE', K.jobs, below, '-inf', 'WITHSCORES', 'LIMIT', 0, 500)
  for index = 1, #batch, 2 do
    if fits(batch[index]) then
      table.insert(found, {batch[index], batch[index + 1]})
      if #found == most then return found end
    end
  end
  if #batch < 1000 then return found end
  below = '(' .. batch[#batch]
end
