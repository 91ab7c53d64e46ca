"""One request answered: at once, or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import SpoliaError
from spolia_gateway.caller import Caller
from spolia_gateway.http.event_stream import DONE, ChunkEvents, EventStream, event
from spolia_gateway.http.front_door import FrontDoor
from spolia_gateway.http.gathered import Gathered, reason_of
from spolia_gateway.http.logprob_tokens import tokens_of
from spolia_gateway.http.shapes import Envelope, Shape
from spolia_gateway.http.together import Numbered, together
from spolia_gateway.http.usage import usage_of


@dataclass(frozen=True, slots=True)
class Answering:
    """Messages for the gateway, one for each prompt, and how their answer is told. Choices go prompt by prompt."""

    messages: Sequence[gateway_pb2.GenerateRequest]
    num_samples: int
    shape: Shape
    envelope: Envelope
    explain: Callable[[SpoliaError], SpoliaError] | None = None
    """Tells an error in the words of the request, where the gateway's are others."""

    async def answer(
        self, front: FrontDoor, caller: Caller, request: Request, *, streams: bool, tells_usage: bool
    ) -> Response:
        """The response. All work for it ends with it, and when the client goes away."""
        events = self._events(front, caller)
        if streams:
            return EventStream(front.calls, self._chunks(events, tells_usage=tells_usage))
        return JSONResponse(await front.calls.run(request.receive, self._whole(events)))

    def _events(self, front: FrontDoor, caller: Caller) -> AsyncGenerator[Numbered, None]:
        deadline = front.deadline()
        events = together([front.gateway.generate(message, caller, deadline) for message in self.messages])
        return events if self.explain is None else _explained(events, self.explain)

    async def _whole(self, events: AsyncGenerator[Numbered, None]) -> dict[str, Any]:
        answers = [Gathered.of(self.num_samples) for _ in self.messages]
        async with aclosing(events) as numbered:
            async for prompt_index, response in numbered:
                answers[prompt_index].take(response)
        samples = [sample for answer in answers for sample in answer.samples]
        choices = [self.shape.whole(choice, sample) for choice, sample in enumerate(samples)]
        return self.envelope.whole(choices, usage_of([answer.finish for answer in answers]))

    async def _chunks(
        self, events: AsyncGenerator[Numbered, None], *, tells_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The stream's events, its end in one piece. With usage, every chunk has the field, as OpenAI's has."""
        finishes: dict[int, common_pb2.Finish] = {}
        last = b""
        opened: set[int] = set()
        chunks = ChunkEvents(self.envelope.around_choices() | ({"usage": None} if tells_usage else {}))
        async with aclosing(events) as numbered:
            async for prompt_index, response in numbered:
                first_choice = prompt_index * self.num_samples
                if response.HasField("finish"):
                    finishes[prompt_index] = response.finish
                    choices = self._endings(first_choice, response.finish, opened)
                else:
                    choices = self._pieces(first_choice + response.delta.sample_index, response.delta, opened)
                events_of_choices = b"".join([chunks.of(choice) for choice in choices])
                if len(finishes) == len(self.messages):
                    last = events_of_choices
                elif events_of_choices:
                    yield events_of_choices
        if tells_usage:
            usage = usage_of([finishes[index] for index in sorted(finishes)])
            last += event(self.envelope.chunk([]) | {"usage": usage})
        yield last + DONE

    def _pieces(self, choice: int, delta: common_pb2.TokenDelta, opened: set[int]) -> list[dict[str, Any]]:
        """A delta's chunks. Tokens of which no text is final yet are told where they are asked for, else with it."""
        tokens = tokens_of(delta)
        piece = self.shape.piece(choice, delta.text, tokens) if delta.text or tokens else None
        return self._opening(choice, opened) + ([] if piece is None else [piece])

    def _endings(self, first_choice: int, finish: common_pb2.Finish, opened: set[int]) -> list[dict[str, Any]]:
        endings: list[dict[str, Any]] = []
        for sample_index in range(self.num_samples):
            choice = first_choice + sample_index
            endings += self._opening(choice, opened)
            endings.append(self.shape.ending(choice, reason_of(finish, sample_index)))
        return endings

    def _opening(self, choice: int, opened: set[int]) -> list[dict[str, Any]]:
        if choice in opened:
            return []
        opened.add(choice)
        opening = self.shape.opening(choice)
        return [] if opening is None else [opening]


async def _explained(
    events: AsyncGenerator[Numbered, None], explain: Callable[[SpoliaError], SpoliaError]
) -> AsyncGenerator[Numbered, None]:
    try:
        async with aclosing(events) as numbered:
            async for each in numbered:
                yield each
    except SpoliaError as error:
        raise explain(error) from error
