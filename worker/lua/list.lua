-- below which number ('+inf' or '(number'), most, how many ids to look at, then the names of the indexes that a job
-- must be in → ids and numbers of such jobs, newest first; the number down to which it looked, '' once no older job is
-- left. It walks the smallest of the indexes and looks its ids up in the others.
local below, most, budget = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local walked, others, size = K.jobs, {}, nil
for place = 4, #ARGV do
  local key = K.index .. ARGV[place]
  local count = redis.call('ZCARD', key)
  if not size then
    walked, size = key, count
  elseif count < size then
    table.insert(others, walked)
    walked, size = key, count
  else
    table.insert(others, key)
  end
end

local function is_listed(id)
  for _, key in ipairs(others) do
    if not redis.call('ZSCORE', key, id) then return false end
  end
  return redis.call('EXISTS', K.job .. id) == 1  -- Redis may have lost a record alone, as where it evicts keys
end

local found = {}
while budget > 0 do
  local wanted = math.min(budget, 100)
  local batch = redis.call('ZREVRANGEBYSCORE', walked, below, '-inf', 'WITHSCORES', 'LIMIT', 0, wanted)
  for index = 1, #batch, 2 do
    if is_listed(batch[index]) then
      table.insert(found, {batch[index], batch[index + 1]})
      if #found == most then return {found, batch[index + 1]} end
    end
  end
  if #batch < 2 * wanted then return {found, ''} end
  below = '(' .. batch[#batch]
  budget = budget - wanted
end
return {found, string.sub(below, 2)}
