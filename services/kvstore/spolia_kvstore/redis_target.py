"""Which Redis: a URL taken apart, and the clients and connections made from it.

`redis://`, `rediss://` and `unix://` are redis-py's own; `redis+cluster://` and `rediss+cluster://` name any one node
of a Redis Cluster, `redis+sentinel://` and `rediss+sentinel://` the Sentinels of a primary and its replicas
(`redis_sentinel.py`). Options behind "?" are redis-py's (`ssl_ca_certs`, …), and `sentinel_username` and
`sentinel_password`; time-outs, retries and pools are ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from spolia_core.errors import InvalidRequest
from spolia_kvstore.redis_node import RedisNode
from spolia_kvstore.redis_sentinel import Sentinels, SentinelURL

CLUSTER_SUFFIX, SENTINEL_SUFFIX = "+cluster", "+sentinel"
SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
MAX_CONNECTIONS = 32
DEFAULT_PORT = 6379

Client = Redis | RedisCluster


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """Makes clients. `address` says where, without the password; `options` are redis-py's.

    With `sentinels` it has to be `located` first.
    """

    address: str
    is_cluster: bool
    options: Mapping[str, Any] = field(repr=False)
    sentinels: Sentinels | None = None

    @property
    def db(self) -> int:
        """The number of the database; news of all databases share their channels."""
        return int(self.options.get("db", 0))

    async def located(self) -> RedisTarget:
        """The target for one session: where Sentinels keep a primary up, the one there is now. Raises `Unavailable`."""
        if self.sentinels is None:
            return self
        primary = await self.sentinels.primary()
        options = {**self.options, "host": primary.host, "port": primary.port}
        return replace(self, address=f"{self.address} ({primary.host}:{primary.port})", options=options, sentinels=None)

    def client(self, known_nodes: Collection[RedisNode] = ()) -> Client:
        """A client that has not connected yet. A cluster is sought at `known_nodes` too."""
        options = dict(self.options)
        if not self.is_cluster:
            return Redis.from_pool(ConnectionPool(**options))
        if options.pop("connection_class", Connection) is not Connection:
            options["ssl"] = True
        nodes = [ClusterNode(node.host, node.port) for node in known_nodes]
        return RedisCluster(startup_nodes=nodes, **options)

    def connection(self, node: RedisNode | None) -> Connection:
        """One connection outside any pool, to a node of the cluster or to the one server there is."""
        options = dict(self.options)
        if node is not None:
            options.update(host=node.host, port=node.port)
        pool: Any = ConnectionPool(**options)  # its methods have no types
        made: Connection = pool.make_connection()
        return made

    def said(self, error: Exception) -> str:
        """`error` in words fit for a log: without the password."""
        text = str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
        password = self.options.get("password")
        return text.replace(password, "***") if password else text


def redis_target(url: str, timeout_s: float) -> RedisTarget:
    """Connects to nothing. Raises `InvalidRequest`, which never repeats the URL: it may hold a password."""
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    if not mark or scheme not in SCHEMES:
        _refuse("has no scheme that is known")
    is_cluster, sentinel = scheme.endswith(CLUSTER_SUFFIX), None
    try:
        if scheme.endswith(SENTINEL_SUFFIX):
            sentinel = SentinelURL.read(rest)
            rest = sentinel.rest
        plain = scheme.removesuffix(CLUSTER_SUFFIX).removesuffix(SENTINEL_SUFFIX)
        parsed: dict[str, Any] = dict(parse_url(f"{plain}://{rest}"))
    except ValueError:
        _refuse("cannot be read")
    if scheme == "unix" and not parsed.get("path"):
        _refuse("names no socket")
    if scheme != "unix":
        parsed.setdefault("host", "localhost")
        parsed.setdefault("port", DEFAULT_PORT)
    sentinels = None if sentinel is None else _sentinels(sentinel, parsed, timeout_s)
    address = _address(scheme, parsed) if sentinel is None else f"{scheme}://{sentinel.shown}"
    target = RedisTarget(address, is_cluster, {**parsed, **_our_options(timeout_s)}, sentinels)
    try:
        target.client()
        target.connection(None)  # options that no connection has are found out here
    except (RedisError, RedisClusterException, TypeError, ValueError, OSError):
        _refuse("has options that do not fit")
    return target


def _sentinels(url: SentinelURL, parsed: dict[str, Any], timeout_s: float) -> Sentinels:
    """Takes out of `parsed` what is for them alone: they share TLS with the primary, and nothing else."""
    own = {name: parsed.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    return Sentinels(url.nodes, url.name, {**parsed, **_our_options(timeout_s), **own, "db": 0})


def _our_options(timeout_s: float) -> dict[str, Any]:
    """No time-out on single reads: a deadline is on the whole exchange, and cancelling closes its connection."""
    return {
        "socket_connect_timeout": timeout_s,
        "socket_timeout": None,
        "retry": Retry(NoBackoff(), 0),
        "max_connections": MAX_CONNECTIONS,
        "protocol": 2,
        "driver_info": None,
        "decode_responses": False,
    }


def _address(scheme: str, parsed: Mapping[str, Any]) -> str:
    if "path" in parsed:
        return f"{scheme}://{parsed['path']}"
    return f"{scheme}://{parsed['host']}:{parsed['port']}"


def _refuse(why: str) -> NoReturn:
    limit = f"a URL that begins with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
    raise InvalidRequest(f"redis_url must be {limit}; the one given {why}", field="redis_url", limit=limit) from None
