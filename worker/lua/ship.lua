-- id, holder, who, status or '', id of the event before, most to keep, number of events, then id and JSON of each,
-- then fields → 'shipped'; the newest id there is where it is older than the event before (an older state was
-- restored: ship from there again); false when another attempt has the job. Events there already are passed over; the
-- fields are set unless all events were there already. An attempt that was given up with events left may still ship
-- them, until the next attempt is placed.
local id, holder, who, to, before, most, count = unpack(ARGV)
local leased = holds(id, holder)
local left = tonumber(count) > 0 and redis.call('SISMEMBER', K.unshipped, id) == 1
if not leased and not (left and redis.call('HGET', K.job .. id, 'attempt') == holder) then return false end

local known = newest(id)
if place_of(before) > place_of(known) then return known end
local behind = 7 + 2 * tonumber(count)
for index = 8, behind, 2 do
  if place_of(ARGV[index]) > place_of(known) then
    redis.call('XADD', K.events .. id, 'MAXLEN', '~', most, ARGV[index], 'event', ARGV[index + 1])
  end
end
-- a status that the table forbids now (someone asked to cancel meanwhile) is passed over
if leased and to ~= '' then move(id, to, who, '') end
local new = behind == 7 or place_of(ARGV[behind - 1]) > place_of(known)
if new and #ARGV > behind then redis.call('HSET', K.job .. id, unpack(ARGV, behind + 1)) end
if not leased then redis.call('HDEL', K.job .. id, 'eta_seconds', 'phase') end
return 'shipped'
