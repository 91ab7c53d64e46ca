"""What goes to a client together: each piece that goes alone costs a system call, and wakes the client."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import h11
from gateway_fakes import delta, finish

from spolia.v1 import gateway_pb2
from spolia_gateway.http.answering import Answering
from spolia_gateway.http.connection import AnswerWriter
from spolia_gateway.http.event_stream import DONE
from spolia_gateway.http.shapes import ChatShape, Envelope
from spolia_gateway.http.together import together

HEAD = b"HTTP/1.1 200"


def asked(head: str = "") -> AnswerWriter:
    """A connection whose client has asked."""
    connection = AnswerWriter(h11.SERVER)
    connection.receive_data(f"POST / HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode())
    assert isinstance(connection.next_event(), h11.Request)
    return connection


def test_the_head_of_an_answer_goes_with_its_first_bytes() -> None:
    connection = asked()
    assert connection.send(h11.Response(status_code=200, headers=[])) == b""
    first = connection.send(h11.Data(data=b"one")) or b""
    assert first.startswith(HEAD)
    assert first.endswith(b"3\r\none\r\n")
    assert connection.send(h11.Data(data=b"two")) == b"3\r\ntwo\r\n"
    assert connection.send(h11.EndOfMessage()) == b"0\r\n\r\n"


def test_an_answer_without_a_body_has_its_head() -> None:
    connection = asked()
    connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
    assert connection.send(h11.Data(data=b"")) != connection.send(h11.EndOfMessage())
    assert connection.our_state is h11.DONE


def test_who_waits_to_be_asked_for_a_body_is_asked_at_once() -> None:
    connection = asked("content-length: 3\r\nexpect: 100-continue\r\n")
    asks = connection.send(h11.InformationalResponse(status_code=100, headers=[]))
    assert asks is not None
    assert asks.startswith(b"HTTP/1.1 100")


async def pieces(tells_usage: bool, *answers: int) -> list[bytes]:
    """What a stream sends of answers that have so many tokens."""

    async def answer(num_tokens: int) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        for index in range(num_tokens):
            yield gateway_pb2.GenerateResponse(delta=delta(index, (70,), "a", index).delta)
        yield gateway_pb2.GenerateResponse(finish=finish("d0", num_tokens).finish)

    texts: Any = None  # asked for log-probabilities only
    shape = ChatShape(texts, has_logprobs=False)
    messages = [gateway_pb2.GenerateRequest() for _ in answers]
    answering = Answering(messages, 1, shape, Envelope(shape, "id", "tiny"))
    events = together([answer(num_tokens) for num_tokens in answers])
    return [piece async for piece in answering._chunks(events, tells_usage=tells_usage)]


async def test_a_stream_sends_a_piece_for_each_token_and_one_for_its_end() -> None:
    told = await pieces(True, 3)
    assert len(told) == 4
    assert told[-1].endswith(DONE)
    ending, usage = (json.loads(event.removeprefix(b"data: ")) for event in told[-1].split(b"\n\n")[:2])
    assert ending["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 3
    assert len(await pieces(False, 3)) == 4


async def test_of_several_answers_each_ends_when_it_does_and_the_last_with_the_stream() -> None:
    told = b"".join(await pieces(False, 1, 3))
    assert told.count(b'"finish_reason":"length"') == 2
    assert told.endswith(DONE)
    assert told.count(DONE) == 1
