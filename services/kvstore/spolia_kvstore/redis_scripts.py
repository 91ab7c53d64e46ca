"""What must happen at once in Redis, as Lua. A script touches names of one hash tag, and asks no clock but Redis's own.

Only what Redis 6.2 has. Scripts are called by their digest; where Redis does not know it (it was restarted, or another
node has taken over) the whole text is sent, and known from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha1

Argument = bytes | str | int


@dataclass(frozen=True, slots=True)
class Script:
    """A script and the name Redis knows it by."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.text.encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class Command:
    """One command to Redis; `with_text` is the same where Redis must be told the script."""

    args: tuple[Argument, ...]
    with_text: tuple[Argument, ...] = ()


def command(name: str, *args: Argument) -> Command:
    """A command of Redis's own."""
    return Command((name, *args))


def call(script: Script, keys: Sequence[str], *args: Argument) -> Command:
    """A call of a script."""
    rest = (len(keys), *keys, *args)
    return Command(("EVALSHA", script.sha, *rest), ("EVAL", script.text, *rest))


PROBE = Script("""
redis.call('SET', KEYS[1], '1', 'PX', 60000)
redis.call('PUBLISH', ARGV[1], '')
return 1
""")
"""KEYS: probe. ARGV: channel. Tries what the others need; nobody heeds an empty message."""

PUBLISH = Script("""
local buried = ARGV[4] ~= 'new' and redis.call('GET', KEYS[3])
if buried and tonumber(buried) > tonumber(ARGV[4]) then
    local store = string.sub(ARGV[5], 3)
    local is_listed = redis.call('HEXISTS', KEYS[1], '1:' .. store) + redis.call('HEXISTS', KEYS[1], '2:' .. store)
    if is_listed == 0 then return 0 end
end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
if redis.call('DEL', KEYS[2]) == 1 then redis.call('PUBLISH', ARGV[2], ARGV[3]) end
return 1
""")
"""KEYS: replicas, claim, buried. ARGV: ttl in ms, channel, news, "new" or when it was stored, in ms since the epoch,
then fields and values of one store. Says whether it was taken: not what was buried since it was stored, as far as
clocks agree. A store that is listed has said "new" since: burying ends every listing.
"""

BURY = Script("""
local time = redis.call('TIME')
redis.call('SET', KEYS[1], string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), 'PX', ARGV[1])
redis.call('DEL', KEYS[2])
return 1
""")
"""KEYS: buried, replicas. ARGV: how long to remember it, in ms."""

CLAIM = Script("""
local live = {}
for i = 4, #ARGV do live[ARGV[i]] = true end
local replicas = redis.call('HGETALL', KEYS[1])
for i = 1, #replicas, 2 do
    local store_id = string.match(replicas[i], '^[12]:(.*)$')
    if store_id and live[store_id] and string.byte(replicas[i + 1], 1) == tonumber(ARGV[3]) then return {1} end
end
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return {0, holder, redis.call('PTTL', KEYS[2])} end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return {0, ARGV[1], tonumber(ARGV[2])}
""")
"""KEYS: replicas, claim. ARGV: owner, ttl in ms, version of values, live stores. Says {1}: stored, or {0, owner, ms}.

A value that readers of this version skip does not count as stored either: nobody would compute what nobody can find.
"""

UNCLAIM = Script("""
local holder = redis.call('GET', KEYS[1])
if not holder or (#ARGV == 3 and holder ~= ARGV[3]) then return 0 end
redis.call('DEL', KEYS[1])
redis.call('PUBLISH', ARGV[1], ARGV[2])
return 1
""")
"""KEYS: claim. ARGV: channel, news, and the owner unless anybody's is meant. Says whether it ended."""

CLAIM_LEFT = Script("""
local holder = redis.call('GET', KEYS[1])
if not holder then return false end
return {holder, redis.call('PTTL', KEYS[1])}
""")
"""KEYS: claim. Says {owner, ms}, or nothing."""

NEXT_SESSION = Script("""
local time = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
local session = string.format('%.0f', math.max(last + 1, time[1] * 1000000 + time[2]))
redis.call('SET', KEYS[1], session)
return session
""")
"""KEYS: session. Not below the time in µs, so that sessions grow even where Redis was restarted without its data."""

RENEW_MEMBER = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HGET', KEYS[1], ARGV[1])
local session, record
if known then
    session, record = string.match(known, '^(%d+):(.*)$')
    if tonumber(session) > tonumber(ARGV[2]) then return 0 end
end
local expiry = tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or '0')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ':' .. ARGV[3])
redis.call('ZADD', KEYS[2], string.format('%.0f', now + ARGV[4]), ARGV[1])
if record ~= ARGV[3] or expiry <= now then redis.call('PUBLISH', ARGV[5], 'changed') end
return 1
""")
"""KEYS: records, expiries. ARGV: node, session, record, lease in ms, channel. Says whether the session may."""

DROP_MEMBER = Script("""
local known = redis.call('HGET', KEYS[1], ARGV[1])
if not known or string.match(known, '^(%d+):') ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('PUBLISH', ARGV[3], 'changed')
return 1
""")
"""KEYS: records, expiries. ARGV: node, session, channel. Says whether it was there."""

MEMBERS = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lapsed = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)
for _, node_id in ipairs(lapsed) do
    redis.call('HDEL', KEYS[1], node_id)
    redis.call('ZREM', KEYS[2], node_id)
end
if #lapsed > 0 then redis.call('PUBLISH', ARGV[1], 'changed') end
local members = {}
local expiries = redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')
for i = 1, #expiries, 2 do
    local known = redis.call('HGET', KEYS[1], expiries[i])
    if known then
        local session, record = string.match(known, '^(%d+):(.*)$')
        table.insert(members, {expiries[i], session, record, expiries[i + 1] - now})
    end
end
return members
""")
"""KEYS: records, expiries. ARGV: channel. Forgets the lapsed; says {node, session, record, ms} of the others."""
