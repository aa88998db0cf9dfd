-- node id → nothing. Nothing new is placed on it. Where it was the last and nothing runs, the end is a clean one:
-- the next agent need not wait for anyone to speak up.
local time = now()
redis.call('ZADD', K.node_leases, 'XX', time, ARGV[1])
if redis.call('ZCOUNT', K.node_leases, '(' .. stamp(time), '+inf') == 0 and redis.call('ZCARD', K.leases) == 0 then
  redis.call('DEL', K.tick)
end
