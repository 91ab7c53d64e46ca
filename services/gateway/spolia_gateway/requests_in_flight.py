"""Generations under way at a gateway, and how far each has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.reuse import ReuseMode

Phase = gateway_pb2.RequestPhase
TOKENIZING, ROUTING = gateway_pb2.REQUEST_PHASE_TOKENIZING, gateway_pb2.REQUEST_PHASE_ROUTING
PREPARING, DECODING = gateway_pb2.REQUEST_PHASE_PREPARING, gateway_pb2.REQUEST_PHASE_DECODING


@dataclass(slots=True, eq=False)
class RequestInFlight:
    """One of them; whoever works on it says how far it has come."""

    request_id: str
    tenant_id: str
    mode: ReuseMode
    arrived_s: float
    phase: Phase.ValueType = TOKENIZING
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    decode_node: str = ""

    def tokenized(self, num_prompt_tokens: int) -> None:
        """Its prompt is known; a decode node is being looked for."""
        self.num_prompt_tokens = num_prompt_tokens
        self.phase = ROUTING

    def given_to(self, decode_node: str) -> None:
        """A decode node works on it."""
        self.decode_node = decode_node
        self.phase = PREPARING

    def came_back(self) -> None:
        """The decode node did not, or does not any more."""
        self.decode_node = ""
        self.phase = ROUTING

    def passed_on(self, num_tokens: int) -> None:
        """Tokens went to the client."""
        if num_tokens:
            self.num_generated_tokens += num_tokens
            self.phase = DECODING


class RequestsInFlight:
    """All of them, in the order in which they came. One event loop's; `now` in monotonic seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._requests: dict[RequestInFlight, None] = {}

    @contextmanager
    def holding(self, request_id: str, tenant_id: str, mode: ReuseMode) -> Iterator[RequestInFlight]:
        """A request, for as long as the block runs."""
        request = RequestInFlight(request_id, tenant_id, mode, self._now())
        self._requests[request] = None
        try:
            yield request
        finally:
            del self._requests[request]

    def told(self) -> list[gateway_pb2.RequestInFlight]:
        """As an operator is told of them, whosever they are: oldest first."""
        now = self._now()
        return [
            gateway_pb2.RequestInFlight(
                request_id=request.request_id,
                phase=request.phase,
                age_ms=(now - request.arrived_s) * 1000,
                mode=common_pb2.ReuseMode.ValueType(request.mode),
                num_prompt_tokens=request.num_prompt_tokens,
                num_generated_tokens=request.num_generated_tokens,
                decode_node=request.decode_node,
                tenant_id=request.tenant_id,
            )
            for request in self._requests
        ]
