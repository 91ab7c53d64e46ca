"""Large bodies of JSON: refused by what is in them before that is parsed, and no stream waits meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import FakeDecode, delta
from gateway_worlds import LAWFUL
from http_worlds import HttpWorld, http_world, says
from hypothesis import given
from hypothesis import strategies as st

from spolia_core.errors import InvalidRequest
from spolia_gateway.http.json_bounds import MAX_CONTAINERS, MAX_TEXTS, SMALL_BYTES, JsonBounds
from spolia_gateway.http.request_body import BodyRefused

MAX_BODY_BYTES = 32 << 20
BOUNDS = JsonBounds.of(MAX_BODY_BYTES, 8 << 20)
MAX_GAP_S = 0.25
"""Of this process' own time: others on the machine hold up nobody here. A body takes less than 50 ms; with the parser
alone these took 0.3 … 100 s.
"""
MEBI = 1 << 20


def many(item: bytes, num_bytes: int) -> bytes:
    return b",".join([item] * (num_bytes // (len(item) + 1)))


BODIES = {
    "numbers": (b'{"prompt":[' + many(b"1", 16 * MEBI) + b"]}", "values"),
    "lists": (b'{"prompt":[' + many(b"[1]", 16 * MEBI) + b"]}", "lists and objects"),
    "strings": (b'{"prompt":[' + many(b'"a"', 16 * MEBI) + b"]}", "strings"),
    "wrong documents": (b'{"prompt":"x","documents":[' + many(b"1", MEBI // 4) + b"]}", "documents[0]"),
    "fields": (
        b'{"prompt":"x",' + b",".join(b'"field_%d":1' % i for i in range(30_000)) + b"}",
        "unrecognised field field_0",
    ),
    "nested": (b'{"prompt":' + b"[" * (16 * MEBI), "lists and objects"),
    "escapes": (b'{"prompt":"' + b"\\n" * (15 * MEBI) + b'"}', "escapes"),
    "text": (
        b'{"prompt":"' + b"words, " * (4 * MEBI) + b'"}',
        "the body has a text of 29360128 bytes; at most 8388608",
    ),
    "texts": (b'{"prompt":[' + many(b'"' + b"words, " * (MEBI + MEBI // 7) + b'"', 30 * MEBI) + b"]}", "context"),
    "a long number": (b'{"prompt":[' + many(b"1", 100_000) + b"," + b"9" * 5000 + b"]}", "digits"),
    "ids": (b'{"prompt":[' + many(b"1", MEBI // 2 - 64) + b"]}", "context"),
}


def posted(address: str, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


async def ticks(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
    for index in range(100_000):
        yield delta(index, (70,), "t", index)
        await asyncio.sleep(0.002)


async def longest_gap(met: HttpWorld, gaps: list[float]) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 200}
    async with met.http.stream("POST", "/v1/completions", json=body) as response:
        last_s = time.process_time()
        async for _ in response.aiter_lines():
            now_s = time.process_time()
            gaps.append(now_s - last_s)
            last_s = now_s


@pytest.mark.parametrize("name", BODIES)
async def test_no_body_holds_up_a_stream(name: str, model: Path) -> None:
    body, told = BODIES[name]
    async with http_world(model, [FakeDecode("d0", ticks)]) as met:
        gaps: list[float] = []
        streaming = asyncio.ensure_future(longest_gap(met, gaps))
        try:
            async with asyncio.timeout(10):
                while len(gaps) < 10:  # noqa: ASYNC110 - no event for it
                    await asyncio.sleep(0.005)
            gaps.clear()
            status, answer = await asyncio.to_thread(posted, met.world.node.http_address, body)
            await asyncio.sleep(0.02)
        finally:
            streaming.cancel()
            await asyncio.gather(streaming, return_exceptions=True)
    assert status == 400
    assert told in answer["error"]["message"]
    assert max(gaps) < MAX_GAP_S


async def test_what_a_context_can_hold_is_read(model: Path) -> None:
    async with http_world(model, [FakeDecode("d0", says)]) as met:
        documents = [{"text": '"stone", [1], {2} \\ ' + "é" * 40, "title": str(index)} for index in range(2000)]
        body = json.dumps({"prompt": "x", "documents": documents}).encode()
        assert len(body) > SMALL_BYTES
        answer = await met.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert "documents[0].title has no place" in answer.json()["error"]["message"], "read whole, and understood"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\\\[]{},:\n\u00e9\U0001f600'),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(alphabet='a"\\[,{', max_size=4), inner, max_size=6)
    ),
    max_leaves=40,
)


def counted(value: Any) -> tuple[int, int, int]:
    """Strings, containers, and values that others stand beside, the slow way."""
    if isinstance(value, str):
        return 1, 0, 0
    if not isinstance(value, list | dict):
        return 0, 0, 0
    keys = len(value) if isinstance(value, dict) else 0
    inner = [counted(each) for each in (value.values() if isinstance(value, dict) else value)]
    texts, containers, commas = (sum(column) for column in zip(*inner, strict=True)) if inner else (0, 0, 0)
    return texts + keys, containers + 1, commas + max(0, len(value) - 1)


@LAWFUL
@given(json_values, st.booleans())
def test_counts_are_those_of_the_values_whatever_is_in_the_texts(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    texts, containers, commas = counted(value)
    limits = {"MAX_TEXTS": texts, "MAX_CONTAINERS": containers}
    with pytest.MonkeyPatch.context() as patch:
        for limit, count in limits.items():
            patch.setattr(f"spolia_gateway.http.json_bounds.{limit}", count)
        JsonBounds(commas + containers, body.count(b"\\"), MEBI).check(body)
        for limit, count in limits.items():
            if count:
                patch.setattr(f"spolia_gateway.http.json_bounds.{limit}", count - 1)
                with pytest.raises(InvalidRequest):
                    JsonBounds(commas + containers, 1000, MEBI).check(body)
                patch.setattr(f"spolia_gateway.http.json_bounds.{limit}", count)
        if commas + containers:
            with pytest.raises(InvalidRequest, match="values"):
                JsonBounds(commas + containers - 1, 1000, MEBI).check(body)


def texts_of(value: Any) -> list[str]:
    """All strings of a value, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [*value, *(text for each in value.values() for text in texts_of(each))]
    return [text for each in value for text in texts_of(each)] if isinstance(value, list) else []


@LAWFUL
@given(json_values, st.booleans())
def test_no_text_is_refused_that_is_short_enough_however_it_is_written(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    longest = max((len(text.encode()) for text in texts_of(value)), default=0)
    JsonBounds(1000, 1000, longest).check(body)
    if longest and b"\\" not in body:
        with pytest.raises(InvalidRequest, match=f"a text of {longest} bytes; at most {longest - 1}"):
            JsonBounds(1000, 1000, longest - 1).check(body)


def test_an_error_names_what_there_is_too_much_of_and_the_limit() -> None:
    with pytest.raises(InvalidRequest) as caught:
        BOUNDS.check(b"[" + many(b"1", 2 * (BOUNDS.max_values + 10)) + b"]")
    assert caught.value.limit == "262144 values"
    assert "send long prompts as text" in caught.value.message
    BOUNDS.check(b'{"documents":[' + many(b'{"text":"a","title":"b"}', 25 * 4096) + b"]}")
    assert MAX_TEXTS > 4 * 4096
    assert MAX_CONTAINERS > 4096


def test_other_encodings_than_utf_8_are_refused() -> None:
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        with pytest.raises(BodyRefused, match="400"):
            BOUNDS.check('{"prompt":"x"}'.encode(encoding))
