"""Nothing sent over HTTP breaks the gateway: what its schema allows and forbids, and bytes that are nearly HTTP."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import schemathesis
from chats import http_chats
from effort import SECONDS, fuzz
from fuzz_world import FuzzWorld
from hypothesis import strategies as st
from messages import damaged
from schemathesis.generation import GenerationMode

pytestmark = pytest.mark.timeout(SECONDS * 2 + 600)

TIMEOUT_S = 20.0
FEW_TOKENS = 3
OPEN = {"/", "/page/{name}", "/health", "/version"}
"""Asked for without a key."""
CHAT = "/v1/chat/completions"
OPERATORS = {"/metrics", "/cluster"}
CAUSED = {504}
"""Of 5xx, what may come in a cluster that is well: an answer too long for the time it has."""


@contextmanager
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.trust_env = False
        yield made


def shown(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def hurry(case: Any) -> None:
    """Long answers are no better inputs than short ones: those that may be short are."""
    body = case.body
    if isinstance(body, dict) and case.path in ("/v1/completions", CHAT):
        for name in ("max_tokens", "max_completion_tokens", "n"):
            if type(body.get(name)) is int and body[name] > FEW_TOKENS:
                body[name] = FEW_TOKENS
        if isinstance(body.get("model"), str):
            del body["model"]  # hardly ever drawn as it is called here, and nothing behind it would be tried
        if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
            body["max_tokens"] = FEW_TOKENS


def chats(operation: Any) -> st.SearchStrategy[Any]:
    """Cases of the chat's operation with a body that is answered."""

    def spoken(case: Any, body: dict[str, Any]) -> Any:
        case.body = body
        return case

    return st.builds(spoken, operation.as_strategy(generation_mode=GenerationMode.POSITIVE), http_chats())


def judge(path: str, who: str, answer: Any) -> None:
    """Fails unless the answer is one that this caller may get, in the form that is promised."""
    status, headers = answer.status_code, answer.headers
    told = (status, path, who, answer.text[:500])
    assert status < 500 or status in CAUSED, told
    assert "x-request-id" in headers, told
    if who in ("nobody", "stranger", "late") and path not in OPEN:
        assert status in (400, 401, 404, 405), told
    if who == "user" and path in OPERATORS:
        assert status in (400, 403, 405), told
    if status == 429:
        assert int(headers["retry-after"]) >= 1, told
    if status >= 400:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, told
        assert error["message"], told


def test_requests_that_the_schema_allows_or_forbids(world: FuzzWorld, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"http://{world.gateway.http_address}"
    statuses: Counter[str] = Counter()
    with session() as asking:
        asking.get(f"{base}/v1/models", timeout=TIMEOUT_S)
        schema = schemathesis.openapi.from_dict(asking.get(f"{base}/openapi.json", timeout=TIMEOUT_S).json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 8
    cases = st.one_of(
        *(
            operation.as_strategy(generation_mode=mode)
            for operation in operations
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            if mode is GenerationMode.POSITIVE or operation.body or operation.path_parameters
        )
    )

    spoken = chats(next(operation for operation in operations if operation.path == CHAT))
    drawn = st.sampled_from([cases, cases, cases, spoken]).flatmap(lambda chosen: chosen)

    def one(case: Any, who: str, asking: requests.Session) -> None:
        hurry(case)
        answer = asking.request(
            **{**case.as_transport_kwargs(base_url=base, headers=shown(world.keys[who])), "timeout": TIMEOUT_S}
        )
        statuses[f"{case.operation.path} {answer.status_code}"] += 1
        judge(case.operation.path, who, answer)

    with world.at_rest(), session() as asking:
        who = st.sampled_from(["user", "user", "operator", "nobody", "stranger", "late"])
        fuzz(lambda case, who: one(case, who, asking), 0.35, 40, case=drawn, who=who)
    tell(capsys, "HTTP by schema", statuses)
    assert any(status.endswith(" 200") for status in statuses), statuses
    assert statuses[f"{CHAT} 200"] >= 3, statuses


BODY = b'{"prompt": "ab", "max_tokens": 2, "documents": ["abcdef"], "reuse": "linked", "seed": 1, "stream": true}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def nearly_http(key: bytes) -> st.SearchStrategy[bytes]:
    """A few requests, one behind the other, some of them damaged."""
    signed = HEAD + b"authorization: Bearer " + key + b"\r\n"
    good = [
        signed + b"content-length: " + str(len(BODY)).encode() + b"\r\n\r\n" + BODY,
        signed
        + b"transfer-encoding: chunked\r\n\r\n"
        + hex(len(BODY))[2:].encode()
        + b"\r\n"
        + BODY
        + b"\r\n0\r\n\r\n",
        signed + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
        signed + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"content-length: 90000000\r\n\r\n" + b"{" * 100,
        b"GET /version HTTP/1.0\r\nconnection: keep-alive\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"HEAD /page/main.js HTTP/1.1\r\nhost: localhost\r\nif-none-match: *\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ]
    one = st.sampled_from(good)
    return st.lists(st.one_of(one, one.flatmap(damaged)), min_size=1, max_size=3).map(b"".join)


def test_bytes_that_are_nearly_http(world: FuzzWorld, capsys: pytest.CaptureFixture[str]) -> None:
    host, port = world.gateway.http_address.split(":")
    statuses: Counter[str] = Counter()

    def one(sent: bytes, reads: bool) -> None:
        with socket.create_connection((host, int(port)), TIMEOUT_S) as raw:
            try:
                raw.sendall(sent)
                raw.shutdown(socket.SHUT_WR)
                answer = raw.recv(1 << 16) if reads else b""
            except OSError:  # the server may end what is no HTTP at once
                answer = b""
        line = answer.split(b"\r\n")[0]
        statuses[line[:12].decode("latin-1")] += 1
        assert not line or line.startswith(b"HTTP/1.1 "), answer[:200]
        assert not line.startswith(b"HTTP/1.1 5"), answer[:500]

    key = world.keys["user"]
    assert key is not None
    with world.at_rest():
        fuzz(one, 0.15, 40, sent=nearly_http(key.encode()), reads=st.booleans())
    tell(capsys, "HTTP by bytes", statuses)
    assert "HTTP/1.1 200" in statuses, statuses


def tell(capsys: pytest.CaptureFixture[str], what: str, statuses: Mapping[str, int]) -> None:
    if SECONDS:
        with capsys.disabled():
            print(f"\n{what}: {sum(statuses.values())} requests, {dict(sorted(statuses.items()))}")
