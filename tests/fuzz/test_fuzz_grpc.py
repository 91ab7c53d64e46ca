"""No request makes a node break: whatever comes is answered by name, and nothing is held for it afterwards."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from effort import SECONDS, fuzz
from fuzz_world import FuzzWorld
from fuzzed_calls import FuzzedCall, Leaving
from good_messages import Method, methods_of
from hypothesis import strategies as st
from messages import requests

from spolia.v1 import decode_pb2, directory_pb2, gateway_pb2, kvstore_pb2, prefill_pb2

pytestmark = pytest.mark.timeout(SECONDS * 2 + 600)

SHARE = 0.1
"""Of the seconds asked for, for each of five services."""


@st.composite
def calls(draw: Any, methods: list[Method], keys: list[str | None]) -> FuzzedCall:
    """A call of one of the methods, its requests a good sequence with some spoilt, or any sequence."""
    method = draw(st.sampled_from(methods))
    told = [message.SerializeToString() for message in method.good]
    if not method.streams:
        sent = [draw(requests(method.good))] * draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
    elif draw(st.booleans()):
        sent = list(told)
        for _ in range(draw(st.integers(0, 2))):
            sent[draw(st.integers(0, len(sent) - 1))] = draw(requests(method.good))
    else:
        sent = draw(st.lists(st.sampled_from(told) | requests(method.good), max_size=5))
    return FuzzedCall(method, sent, draw(st.sampled_from(list(Leaving))), draw(st.sampled_from(keys)))


@st.composite
def done_calls(draw: Any, methods: list[Method], key: str | None) -> FuzzedCall:
    """A call that is done where its caller stays; most do."""
    method = draw(st.sampled_from([method for method in methods if method.valid is not None]))
    assert method.valid is not None
    leaving = draw(st.sampled_from([Leaving.AFTER_ALL, Leaving.AFTER_ALL, Leaving.AFTER_FIRST, Leaving.AT_ONCE]))
    return FuzzedCall(method, [draw(method.valid).SerializeToString()], leaving, key)


@st.composite
def awaited_calls(draw: Any, methods: list[Method], key: str | None) -> FuzzedCall:
    """A call that may be spoilt, by a caller who is known and stays for what is said of it."""
    method = draw(st.sampled_from(methods))
    return FuzzedCall(method, [draw(requests(method.good))], Leaving.AFTER_ALL, key)


def test_every_call_of_every_service_is_fuzzed(world: FuzzWorld) -> None:
    files = (decode_pb2, directory_pb2, gateway_pb2, kvstore_pb2, prefill_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    served = {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}
    assert {method.path for method in methods_of(world)} == served


@pytest.mark.parametrize("node", ["gateway", "decode", "prefill", "store", "directory"])
def test_no_request_breaks_a_node_or_leaves_anything_held(
    world: FuzzWorld, node: str, record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [method for method in methods_of(world) if method.node == node]
    keys = [*world.keys.values(), *[world.keys["operator"]] * 9] if node == "gateway" else [None]
    statuses: Counter[str] = Counter()

    def one(call: FuzzedCall) -> None:
        world.run(call.make(world, statuses))

    with world.at_rest():
        drawn = [calls(methods, keys)] * 2 + [awaited_calls(methods, keys[-1])]
        drawn += [done_calls(methods, key) for key in keys[-1:] if node == "gateway"]
        # The gateway's callers leave, or are strangers, more often than not.
        fuzz(one, SHARE, 90 if node == "gateway" else 30, call=st.sampled_from(drawn).flatmap(lambda chosen: chosen))
    with capsys.disabled():
        if SECONDS:
            print(f"\n{node}: {sum(statuses.values())} calls, {dict(sorted(statuses.items()))}")
    assert any(status.endswith(" OK") for status in statuses), statuses
    if node == "gateway":
        answered = [count for status, count in statuses.items() if status.endswith(("Generate OK", "RenderChat OK"))]
        assert sum(answered) >= 3, statuses
    assert any(status.endswith(" INVALID_ARGUMENT") for status in statuses) or node == "directory", statuses
