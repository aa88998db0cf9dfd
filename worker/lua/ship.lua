-- id, holder, who, status or '', id of the event before, most to keep, number of events, then id and JSON of each,
-- then fields → 'shipped'; the newest id there is where it is older than the event before (an older state was
-- restored: ship from there again); false when another attempt has the job. Events there already are passed over.
local id, holder, who, to, before, most, count = unpack(ARGV)
if not holds(id, holder) then return false end

-- where an event stands among all: exact, as no attempt has four thousand million
local function place(event)
  local attempt, seq = string.match(event, '^(%d+)-(%d+)$')
  return attempt * 2 ^ 32 + seq
end

local known = newest(id)
if place(before) > place(known) then return known end
local behind = 7 + 2 * tonumber(count)
for index = 8, behind, 2 do
  if place(ARGV[index]) > place(known) then
    redis.call('XADD', K.events .. id, 'MAXLEN', '~', most, ARGV[index], 'event', ARGV[index + 1])
  end
end
-- a status that the table forbids now (someone asked to cancel meanwhile) is passed over
if to ~= '' then move(id, to, who, '') end
if #ARGV > behind then redis.call('HSET', K.job .. id, unpack(ARGV, behind + 1)) end
return 'shipped'
