"""Which Redis: a URL taken apart, and the clients and connections made from it.

`redis://`, `rediss://` and `unix://` are redis-py's own; `redis+cluster://` and `rediss+cluster://` name any one node
of a Redis Cluster. Options behind "?" are redis-py's (`ssl_ca_certs`, …); time-outs, retries and pools are ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from spolia_core.errors import InvalidRequest

CLUSTER_SUFFIX = "+cluster"
SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
MAX_CONNECTIONS = 32
DEFAULT_PORT = 6379

Client = Redis | RedisCluster


@dataclass(frozen=True, slots=True)
class RedisNode:
    """Where a node of a Redis Cluster listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """Makes clients. `address` says where, without the password; `options` are redis-py's."""

    address: str
    is_cluster: bool
    options: Mapping[str, Any] = field(repr=False)

    @property
    def db(self) -> int:
        """The number of the database; news of all databases share their channels."""
        return int(self.options.get("db", 0))

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
    try:
        parsed: dict[str, Any] = dict(parse_url(f"{scheme.removesuffix(CLUSTER_SUFFIX)}://{rest}"))
    except ValueError:
        _refuse("cannot be read")
    if scheme == "unix" and not parsed.get("path"):
        _refuse("names no socket")
    is_cluster = scheme.endswith(CLUSTER_SUFFIX)
    if scheme != "unix":
        parsed.setdefault("host", "localhost")
        parsed.setdefault("port", DEFAULT_PORT)
    target = RedisTarget(_address(scheme, parsed), is_cluster, {**parsed, **_our_options(timeout_s)})
    try:
        target.client()
        target.connection(None)  # options that no connection has are found out here
    except (RedisError, RedisClusterException, TypeError, ValueError, OSError):
        _refuse("has options that do not fit")
    return target


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
