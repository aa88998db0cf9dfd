-- node id, its record as JSON, its pool, [runs root, [[slot id, ranks, device], by ranks]] as JSON, lease seconds,
-- seconds after which a silent node is forgotten → nothing. A node is alive, and offers its slots to its pool. If that
-- is news, the pool's agents look at their queue.
local id, record, pool, offer, lease, silence = unpack(ARGV)
local time = now()
local before, ends = redis.call('HGET', K.nodes, id), tonumber(redis.call('ZSCORE', K.node_leases, id) or 0)
if before ~= record then
  local readable, known = pcall(cjson.decode, before or '{}')
  if readable and known.pool and known.pool ~= pool then redis.call('HDEL', K.offers .. known.pool, id) end
  redis.call('HSET', K.nodes, id, record)
end
redis.call('HSET', K.offers .. pool, id, offer)
redis.call('ZADD', K.node_leases, stamp(time + lease), id)
if before ~= record or ends <= time then ring(pool) end
-- placement drops the offers of a node without a record
for _, silent in ipairs(redis.call('ZRANGEBYSCORE', K.node_leases, '-inf', stamp(time - silence))) do
  redis.call('ZREM', K.node_leases, silent)
  redis.call('HDEL', K.nodes, silent)
end
