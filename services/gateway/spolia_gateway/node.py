"""One gateway node: tokenizer, view of the cluster and server put together. The only place that knows them all."""

from __future__ import annotations

from spolia.v1.directory_pb2 import NODE_ROLE_GATEWAY, NodeLoad, NodeRecord
from spolia.version import __version__
from spolia_core.errors import InvalidRequest
from spolia_core.key_book import KeyBook
from spolia_core.key_place import key_place
from spolia_core.tokenizer_files import TokenizerFiles
from spolia_gateway import server
from spolia_gateway.chat_prompt import ChatPrompts
from spolia_gateway.chat_template import ChatTemplate
from spolia_gateway.config import OFF, GatewayConfig
from spolia_gateway.gateway import ROLES, Gateway
from spolia_gateway.http.app import make_app
from spolia_gateway.http.calls import Calls
from spolia_gateway.http.connections import Connections
from spolia_gateway.http.front_door import FrontDoor
from spolia_gateway.http.server import UNWIND_S, HttpServer
from spolia_gateway.identities import Identities
from spolia_gateway.metrics import GatewayMetrics
from spolia_gateway.server import GatewayServer
from spolia_gateway.tenant_use import TenantUse
from spolia_gateway.token_texts import TokenTexts
from spolia_gateway.tokenizer import PartTokenizer
from spolia_node.certificates import PublicCertificates
from spolia_node.channels import ChannelPool
from spolia_node.deadline import Deadline
from spolia_node.key_watch import KeyWatch
from spolia_node.load_metrics import LoadCollector
from spolia_node.logs import get_log
from spolia_node.membership import ClusterView, Registration
from spolia_node.server import NodeServer, join_address

IDLE_CONNECTION_MS = 300_000
"""How long a client of gRPC may stay connected without a call. Clients connect anew by themselves."""

log = get_log(__name__)


class GatewayNode:
    """A gateway node. `start` it on a running loop, then end it with `server.drain` or `stop_at_once`, then `close`.

    Making one loads the tokenizer. Raises `InvalidRequest` when `directory` or `model` is not set, `NotFound` when the
    model's directory holds no tokenizer.
    """

    def __init__(self, config: GatewayConfig) -> None:
        if not config.directory:
            raise InvalidRequest("directory must be set: a gateway finds its nodes there", field="directory")
        if config.model is None:
            raise InvalidRequest("model must be set: a gateway tokenizes for it", field="model")
        self.config = config
        self.server = NodeServer(config, "gateway")
        if config.public_tls_dir is not None:
            self.server.front_certificates = PublicCertificates(config.public_tls_dir)
        self._channels = ChannelPool(config.max_message_bytes, self.server.certificates)
        self.cluster = ClusterView(self._channels, config.directory, ROLES)
        files = TokenizerFiles.read(config.model)
        tokenizer = PartTokenizer(files, cache_bytes=config.tokenizer_cache_bytes)
        self._metrics = GatewayMetrics(self.server.metrics, config.tenant)
        self._use = TenantUse(self.server.metrics)
        self._begin_tenant(config.tenant)
        chats = ChatPrompts(ChatTemplate.read(config.model, files.tokenizer_config), config)
        self.gateway = Gateway(config, tokenizer, chats, self.cluster, self._channels, self._metrics, self._use)
        self._keys = self._watch_keys()
        book = None if self._keys is None else self._newest_book
        self.identities = Identities(book, config.anonymous, self.server.metrics)
        self.server.metrics.registry.register(LoadCollector("gateway", lambda: self._load))
        self.server.tracing.begin_at(server.TRACED)
        service = GatewayServer(self.gateway, self.identities, chats, config, self.server)
        self.server.add(service.register, server.SERVICE)
        self.server.admit = service.admit
        self.server.options += [
            ("grpc.max_allowed_incoming_connections", config.max_connections),
            ("grpc.max_connection_idle_ms", IDLE_CONNECTION_MS),
        ]
        self.server.health.watch(lambda: self.gateway.ready)
        self._http = self._http_server(chats, TokenTexts(files.tokenizer, tokenizer.piece_of))

    @property
    def http_address(self) -> str:
        """Where HTTP is served, "host:port"; empty where it is off. Call after `start`."""
        return "" if self._http is None else join_address(self.config.advertise_host, self._http.port)

    async def start(self) -> str:
        """Serves and registers; the address for gRPC. Raises `InvalidRequest` for a port that cannot be bound.

        Health says NOT_SERVING until a decode node that serves the model is known.
        """
        await self.server.start()
        if self._http is not None:
            await self._http.start()
            self.server.on_stop.append(self._drain_http)
            self.server.announced["http"] = self.http_address
        if self._keys is not None:
            self._keys.start()
        self._say_who_may()
        self.cluster.start()
        registration = Registration(self._channels, self.config.directory, self._record)
        registration.start()
        self.server.registration = registration
        return self.server.address

    async def close(self) -> None:
        """Gives back what is left once the server has ended. Idempotent."""
        if self._http is not None:
            await self._http.close()
        if self._keys is not None:
            await self._keys.stop()
        await self.cluster.stop()
        await self.gateway.close()
        await self._channels.close()

    def _http_server(self, chats: ChatPrompts, texts: TokenTexts) -> HttpServer | None:
        config, calls = self.config, Calls()
        if config.http_port == OFF:
            return None
        front = FrontDoor(config, self.gateway, self.identities, self.server, chats, texts, calls)
        connections = Connections(self.server.metrics, config.max_connections)
        shown = self.server.front_certificates
        return HttpServer(make_app(front), calls, connections, config.host, config.http_port, shown)

    async def _drain_http(self, deadline: Deadline) -> None:
        assert self._http is not None
        # It must end within the drain's time, with what it has to cut.
        await self._http.drain(Deadline.after(max(0.0, deadline.remaining() - UNWIND_S)))

    def _watch_keys(self) -> KeyWatch | None:
        if not self.config.keys:
            return None
        keys = KeyWatch(key_place(self.config.keys), self.server.metrics, self._begin_tenants)
        self._begin_tenants(keys.book)
        return keys

    def _begin_tenants(self, book: KeyBook) -> None:
        for tenant_id in book.tenant_ids():
            self._begin_tenant(tenant_id)

    def _begin_tenant(self, tenant_id: str) -> None:
        self._metrics.begin(tenant_id)
        self._use.begin(tenant_id)

    def _newest_book(self) -> KeyBook:
        assert self._keys is not None
        return self._keys.book

    def _say_who_may(self) -> None:
        config = self.config
        if config.http_allowed_hosts and config.own_names is None:
            log.warning("http_allowed_hosts counts for nothing: host is not loopback, or callers show keys")
        if self._keys is not None and not self._keys.book.keys:
            log.warning("no API key is known; spolia keys create makes one")
        if config.allow_anonymous and (config.keys or not config.is_local):
            log.warning(
                "serving callers WITHOUT a key, as allow_anonymous says", tenant=config.tenant, host=config.host
            )

    @property
    def _load(self) -> NodeLoad:
        return NodeLoad(num_running=self.gateway.num_running)

    def _record(self) -> NodeRecord:
        load = self._load
        load.serving.CopyFrom(self._metrics.recent.figures())
        return NodeRecord(
            node_id=self.config.node_id,
            role=NODE_ROLE_GATEWAY,
            address=self.server.address,
            load=load,
            draining=self.server.leaving,
            version=__version__,
            metrics_address=self.server.metrics_address,
        )
