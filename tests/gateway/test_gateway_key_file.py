"""Keys end, are withdrawn, and their file may go wrong, while a gateway serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from captured_logs import captured_logs
from gateway_fakes import WAIT_S, FakeDecode, answers
from key_worlds import Keys, generate, guarded, refusal, shown, tokenize, until

from spolia_core.key_book import KeyBook


async def test_a_key_ends_when_it_is_said_to(model: Path, keys: Keys) -> None:
    ended = keys.make("late", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    fresh = keys.make("fresh", expires_at=datetime.now(UTC) + timedelta(hours=1))
    async with guarded(model, keys) as w:
        error, _ = await refusal(tokenize(w, shown(ended)))
        assert "ended at" in error.message
        assert w.node.server.metrics.value("spolia_gateway_refused_total", reason="expired_key") == 1
        assert await tokenize(w, shown(fresh))


async def test_a_withdrawn_key_ends_no_call_and_begins_none(model: Path, keys: Keys) -> None:
    key, go_on = keys.of["acme"], asyncio.Event()

    async def waits(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
        await go_on.wait()
        async for event in answers(node, request, context):
            yield event

    decode = FakeDecode("a", waits)
    async with guarded(model, keys, decode) as w:
        under_way = asyncio.ensure_future(generate(w, key))
        await asyncio.wait_for(decode.started.wait(), WAIT_S)
        record = KeyBook.from_bytes(keys.place.read()).find(key)
        assert record is not None
        keys.place.change(lambda book: book.without_key(record.key_id))
        assert w.node._keys is not None
        watch = w.node._keys
        await until(lambda: watch.book.find(key) is None)
        _, code = await refusal(tokenize(w, shown(key)))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        go_on.set()
        assert await under_way > 1
        new = keys.make("acme")
        await until(lambda: watch.book.find(new) is not None)
        assert await tokenize(w, shown(new))


def reasons(logs: list[MutableMapping[str, Any]]) -> list[str]:
    return [entry["error"] for entry in logs if entry["event"].startswith("new keys cannot be used")]


async def test_a_file_that_goes_wrong_leaves_the_keys_as_they_are(model: Path, keys: Keys) -> None:
    async with guarded(model, keys) as w:
        good = keys.place.read()
        with captured_logs() as logs:
            for number, broken in enumerate((b"{", b'{"format": 9}', good[:100]), start=1):
                keys.write(broken)
                await until(lambda number=number: len(reasons(logs)) == number)
                assert await tokenize(w, shown(keys.of["acme"]))
        assert len(set(reasons(logs))) == 3  # once for each reason
        assert w.node.server.metrics.value("spolia_key_book_reads_total", outcome="failed") >= 3
        keys.write(KeyBook().to_bytes())
        assert w.node._keys is not None
        watch = w.node._keys
        await until(lambda: not watch.book.keys)
        _, code = await refusal(tokenize(w, shown(keys.of["acme"])))
        assert code is grpc.StatusCode.UNAUTHENTICATED
