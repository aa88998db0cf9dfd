-- below which number ('+inf' or '(number'), most, filters as JSON {status, kind, name, parent_job_id, label, value},
-- those wanted → ids and numbers of the jobs that fit, newest first. Here and not by many questions: twelve
-- thousand take one.
local below, most, filters = ARGV[1], tonumber(ARGV[2]), cjson.decode(ARGV[3])
local fields, wanted = {'status'}, {false}
for _, field in ipairs({'status', 'kind', 'name', 'parent_job_id'}) do
  if filters[field] then
    table.insert(fields, field)
    table.insert(wanted, filters[field])
  end
end
if filters.label then table.insert(fields, 'labels') end

local function fits(id)
  local values = redis.call('HMGET', K.job .. id, unpack(fields))
  for index = 2, #wanted do
    if values[index] ~= wanted[index] then return false end
  end
  if not filters.label then return values[1] end
  local labels = values[#values]
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
