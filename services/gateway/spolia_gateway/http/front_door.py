"""What handlers work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from spolia_gateway.chat_prompt import ChatPrompts
from spolia_gateway.config import GatewayConfig
from spolia_gateway.gateway import Gateway
from spolia_gateway.http.calls import Calls
from spolia_gateway.identities import Identities
from spolia_gateway.token_texts import TokenTexts
from spolia_node.deadline import Deadline
from spolia_node.server import NodeServer


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """A gateway as HTTP sees it."""

    config: GatewayConfig
    gateway: Gateway
    identities: Identities
    node: NodeServer
    chats: ChatPrompts
    texts: TokenTexts
    calls: Calls

    def deadline(self) -> Deadline:
        """For a request with a model's work in it; HTTP has no deadline of the client's."""
        return Deadline.after(self.config.default_timeout_s)

    def short_deadline(self) -> Deadline:
        """For requests without."""
        return Deadline.after(self.config.rpc_timeout_s)


async def _front_of(request: Request) -> FrontDoor:
    front: FrontDoor = request.app.state.front
    return front


Front = Annotated[FrontDoor, Depends(_front_of)]
"""A handler's argument."""
