"""A gateway that has keys, and callers who show them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import WAIT_S, FakeDecode
from gateway_worlds import World, text_request, world

from spolia.errors import error_from_rpc
from spolia.v1 import gateway_pb2
from spolia_core.errors import SpoliaError
from spolia_core.key_book import Role, TenantLimits, new_key
from spolia_core.key_file import KeyFile
from spolia_node import key_watch

OPERATOR = frozenset({Role.OPERATOR})


class Keys:
    """A file of keys, and the keys themselves by tenant."""

    def __init__(self, path: Path) -> None:
        self.place = KeyFile(path)
        self.of: dict[str, str] = {}

    def make(self, tenant_id: str, roles: frozenset[Role] = frozenset({Role.USER}), **changes: Any) -> str:
        key, record = new_key(tenant_id, roles, **changes)
        self.place.change(lambda book: book.with_key(record))
        self.of[tenant_id] = key
        return key

    def write(self, content: bytes) -> None:
        Path(self.place.name).write_bytes(content)

    def limit(self, tenant_id: str, **limits: int) -> None:
        self.place.change(lambda book: book.with_limits(tenant_id, TenantLimits(**limits)))


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setattr(key_watch, "LOOK_EVERY_S", 0.02)
    made = Keys(tmp_path / "keys.json")
    made.make("acme")
    made.make("bolt")
    made.make("ops", OPERATOR)
    return made


@asynccontextmanager
async def guarded(model: Path, keys: Keys, *decodes: FakeDecode, **changes: Any) -> AsyncIterator[World]:
    async with world(model, decodes=decodes, keys=keys.place.name, **changes) as w:
        yield w


def shown(key: str | None) -> Any:
    return None if key is None else (("authorization", f"Bearer {key}"),)


async def tokenize(w: World, metadata: Any, text: str = "stones") -> list[int]:
    request = gateway_pb2.TokenizeRequest(text=text)
    return list((await w.stub.Tokenize(request, timeout=WAIT_S, metadata=metadata)).token_ids)


async def generate(w: World, key: str | None, request: gateway_pb2.GenerateRequest | None = None) -> int:
    num_responses = 0
    async for _ in w.stub.Generate(request or text_request("the stones"), timeout=WAIT_S, metadata=shown(key)):
        num_responses += 1
    return num_responses


async def refusal(work: Any) -> tuple[SpoliaError, grpc.StatusCode]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await work
    return error_from_rpc(caught.value), caught.value.code()


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # a file has no event
            await asyncio.sleep(0.01)
