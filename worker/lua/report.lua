-- id, attempt, who, status or '', reason, then fields → whether this attempt still has the job.
-- A status that the table forbids now (someone asked to cancel meanwhile) is passed over.
local id, attempt, who, to, why = unpack(ARGV)
if not holds(id, attempt) then return 0 end
if to ~= '' then move(id, to, who, why) end
if #ARGV > 5 then redis.call('HSET', K.job .. id, unpack(ARGV, 6)) end
return 1
