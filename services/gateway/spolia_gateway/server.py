"""GatewayService over gRPC: translates, decides nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from spolia.v1 import gateway_pb2 as pb
from spolia.v1 import gateway_pb2_grpc
from spolia_gateway.caller import Caller
from spolia_gateway.chat_prompt import ChatPrompts
from spolia_gateway.config import GatewayConfig
from spolia_gateway.gateway import Gateway
from spolia_gateway.identities import Identities
from spolia_node.deadline import Deadline
from spolia_node.server import NodeServer
from spolia_node.tracing import Metadata

SERVICE = pb.DESCRIPTOR.services_by_name["GatewayService"].full_name
TRACED = tuple(f"/{SERVICE}/{method}" for method in ("Generate", "Warm", "Forget"))
"""Where traces begin."""

AUTHORIZATION_KEY = "authorization"


class GatewayServer(gateway_pb2_grpc.GatewayServiceServicer):
    """The service over one `Gateway`. Calls that begin work are refused while the node drains."""

    def __init__(
        self, gateway: Gateway, identities: Identities, chats: ChatPrompts, config: GatewayConfig, node: NodeServer
    ) -> None:
        self._gateway = gateway
        self._chats = chats
        self._identities = identities
        self._config = config
        self._node = node

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server that has not started."""
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self, server)

    def admit(self, method: str, metadata: Metadata) -> None:
        """Raises as `Identities` does for who may not make a call of this service, before its request is taken."""
        service, _, call = method.strip("/").rpartition("/")
        if service == SERVICE:
            self._identified(call, metadata)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Streams an answer. Closed when the client goes away, and with it all work for it."""
        await self._gateway.turnstile.through()
        caller = self._caller("Generate", context)
        self._node.check_accepting()
        async with aclosing(self._gateway.generate(request, caller, self._deadline(context))) as responses:
            async for response in responses:
                yield response

    async def Warm(self, request: pb.WarmRequest, context: Any) -> AsyncGenerator[pb.WarmResponse, None]:
        """Streams progress, document by document."""
        caller = self._caller("Warm", context)
        self._node.check_accepting()
        async with aclosing(self._gateway.warm(request, caller, self._deadline(context))) as responses:
            async for response in responses:
                yield response

    async def Forget(self, request: pb.ForgetRequest, context: Any) -> pb.ForgetResponse:
        """Drops documents everywhere."""
        caller = self._caller("Forget", context)
        self._node.check_accepting()
        return await self._gateway.forget(request, caller, self._short_deadline(context))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Encodes a text."""
        return await self._gateway.tokenize(request, self._caller("Tokenize", context), self._short_deadline(context))

    async def RenderChat(self, request: pb.RenderChatRequest, context: Any) -> pb.RenderChatResponse:
        """Writes a chat as a prompt."""
        caller = self._caller("RenderChat", context)
        with self._gateway.use.request(caller):
            return pb.RenderChatResponse(parts=await self._chats.asked(request))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Lists what is served."""
        self._caller("ListModels", context)
        return self._gateway.list_models()

    async def GetCluster(self, request: pb.GetClusterRequest, context: Any) -> pb.GetClusterResponse:
        """Shows the nodes."""
        self._caller("GetCluster", context)
        return self._gateway.get_cluster()

    def _caller(self, call: str, context: Any) -> Caller:
        return self._identified(call, context.invocation_metadata() or ())

    def _identified(self, call: str, metadata: Metadata) -> Caller:
        """Who makes a call, and may. The tenant comes from the key: nothing else a client sends can name one."""
        header = dict(metadata).get(AUTHORIZATION_KEY)
        caller = self._identities.of_header(header if isinstance(header, str | None) else "")
        self._identities.check_may(caller, call)
        return caller

    def _deadline(self, context: Any) -> Deadline:
        return Deadline.of(context, self._config.default_timeout_s)

    def _short_deadline(self, context: Any) -> Deadline:
        """For calls without a model's work in them."""
        return Deadline.of(context, self._config.rpc_timeout_s)
