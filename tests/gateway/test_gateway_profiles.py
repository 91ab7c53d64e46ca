"""What a gateway makes of the profiles that decode nodes publish."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import FakeDecode, fails_after, record, served_model
from gateway_worlds import World, document_part, world

from spolia.errors import error_from_rpc
from spolia.v1 import common_pb2, directory_pb2, gateway_pb2
from spolia_core.errors import Busy, NotSupported, SpoliaError
from spolia_core.link_terms import linked_forbidden
from spolia_gateway.served_models import models_of

REFUSAL = "its best policy link:32 loses 0.02 nats per token; bounds 0.01 nats and 1 points"
FORBIDS: dict[str, Any] = {"profile": "link32-00c0ffee", "policy": "link:32", "linked_refusal": REFUSAL}
CANNOT: dict[str, Any] = {"supports_linked": False, "linked_refusal": "every layer: rope_type is 'dynamic'"}


def linked(**changes: Any) -> gateway_pb2.GenerateRequest:
    parts = [document_part("the stones"), gateway_pb2.PromptPart(text="of one")]
    return gateway_pb2.GenerateRequest(parts=parts, mode=common_pb2.REUSE_MODE_LINKED, **changes)


async def refusal(w: World, request: gateway_pb2.GenerateRequest) -> SpoliaError:
    with pytest.raises(grpc.RpcError) as caught:
        await w.generate(request)
    return error_from_rpc(caught.value)


async def serve_as(w: World, node: FakeDecode, num_running: int = 0, **changes: Any) -> None:
    """Has a node publish another model, and waits until the gateway knows."""
    served = served_model(**changes)
    w.directory.put(record(node.node_id, address=node.address, model=served, num_running=num_running))
    await w.sees(lambda view: served in [n.model for n in view.nodes(directory_pb2.NODE_ROLE_DECODE)])


async def forbids_on_its_own(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
    raise linked_forbidden("link32-00c0ffee", REFUSAL)
    yield  # a stream that has nothing


async def test_a_forbidding_profile_refuses_linked_with_figures_and_asks_no_node(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], served=served_model(**FORBIDS)) as w:
        error = await refusal(w, linked())
        assert isinstance(error, NotSupported)
        assert (error.field, error.actual) == ("profile", "link32-00c0ffee")
        assert all(word in error.message for word in ("link32-00c0ffee", REFUSAL, "EXACT", "force_linked"))
        assert a.requests == []
        exact = linked()
        exact.mode = common_pb2.REUSE_MODE_EXACT
        await w.generate(exact)
        assert [request.mode for request in a.requests] == [common_pb2.REUSE_MODE_EXACT]


async def test_force_linked_overrides_a_profile_and_is_passed_on(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], served=served_model(**FORBIDS)) as w:
        await w.generate(linked(force_linked=True))
        (request,) = a.requests
        assert request.force_linked
        assert request.mode == common_pb2.REUSE_MODE_LINKED


async def test_force_linked_does_not_override_what_the_model_cannot_do(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], served=served_model(**CANNOT)) as w:
        for force in (False, True):
            error = await refusal(w, linked(force_linked=force))
            assert isinstance(error, NotSupported)
            assert error.field == "mode"
            assert "rope_type" in error.message
        assert a.requests == []


async def test_linked_goes_to_a_node_whose_profile_allows_it(model: Path) -> None:
    a, b = FakeDecode("a"), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await serve_as(w, a, **FORBIDS)
        await w.generate(linked())
        assert (len(a.requests), len(b.requests)) == (0, 1)


async def test_a_node_that_forbids_what_the_gateway_thought_allowed_is_not_the_last_word(model: Path) -> None:
    a, b = FakeDecode("a", forbids_on_its_own), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await w.generate(linked())
        assert (len(a.requests), len(b.requests)) == (1, 1)
        b.script = forbids_on_its_own
        error = await refusal(w, linked())
        assert isinstance(error, NotSupported)
        assert error.field == "profile"
        assert REFUSAL in error.message


LINK4: dict[str, Any] = {"profile": "link4-12345678", "policy": "link:4"}
LINK8: dict[str, Any] = {"profile": "link8-12345678", "policy": "link:8"}
BREAKS = fails_after(2, grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    "other", [LINK8, {"profile": "link4-87654321", "policy": "link:4"}, {}], ids=["tokens", "content", "none"]
)
async def test_a_linked_answer_goes_on_where_the_profile_is_the_same(model: Path, other: dict[str, Any]) -> None:
    a, b, c = FakeDecode("a", BREAKS), FakeDecode("b"), FakeDecode("c")
    async with world(model, decodes=[a, b, c], served=served_model(**LINK4)) as w:
        await serve_as(w, b, num_running=5, **other)  # busier than a, and not as busy as c
        await w.generate(linked())
        assert (len(a.requests), len(b.requests), len(c.requests)) == (1, 0, 1)
        assert c.requests[0].HasField("resume")


@pytest.mark.parametrize("where", ["none is left", "it is busy"])
async def test_an_answer_that_went_on_under_another_profile_says_mixed(model: Path, where: str) -> None:
    a, b, c = FakeDecode("a", BREAKS), FakeDecode("b"), FakeDecode("c", fails_after(0, Busy("full")))
    decodes = [a, b] if where == "none is left" else [a, b, c]
    async with world(model, decodes=decodes, served=served_model(**LINK4)) as w:
        await serve_as(w, b, num_running=5, **LINK8)
        streamed = await w.generate(linked())
        assert streamed.finish is not None
        assert streamed.finish.reuse.profile == "mixed"
        assert list(streamed.finish.reuse.nodes) == [d.node_id for d in decodes if d is not b] + ["b"]
        whole = await w.generate(linked())
        assert whole.finish is not None
        assert whole.finish.reuse.profile != "mixed", "one node gave it all"


async def test_an_exact_answer_takes_no_notice_of_profiles(model: Path) -> None:
    a, b = FakeDecode("a", BREAKS), FakeDecode("b")
    async with world(model, decodes=[a, b], served=served_model(**LINK4)) as w:
        await serve_as(w, b, num_running=5, **LINK8)
        request = linked()
        request.mode = common_pb2.REUSE_MODE_EXACT
        streamed = await w.generate(request)
        assert streamed.finish is not None
        assert streamed.finish.reuse.profile == ""
        assert list(streamed.finish.reuse.nodes) == ["a", "b"]


async def test_an_answer_is_forced_where_any_of_its_nodes_was(model: Path) -> None:
    a, b = FakeDecode("a", BREAKS), FakeDecode("b")
    async with world(model, decodes=[a, b], served=served_model(**FORBIDS)) as w:
        await serve_as(w, b, num_running=5, **LINK4)
        streamed = await w.generate(linked(force_linked=True))
        assert streamed.finish is not None
        assert (len(a.requests), len(b.requests)) == (1, 1)
        assert streamed.finish.reuse.forced
        again = await w.generate(linked(force_linked=True))
        assert again.finish is not None
        assert not again.finish.reuse.forced, "nothing forbade it to the one node there is"


async def test_nodes_of_another_recipe_are_another_model(model: Path) -> None:
    a, b = FakeDecode("a"), FakeDecode("b")
    async with world(model, decodes=[a, b]) as w:
        await w.generate(linked())
        await serve_as(w, a, num_sink_tokens=4)
        w.directory.put(record("c", address="127.0.0.1:1", model=served_model(num_sink_tokens=4), num_running=500))
        await w.sees(lambda view: len(view.nodes(directory_pb2.NODE_ROLE_DECODE)) == 3)
        await w.generate(linked())
        first, second = a.requests
        assert (first.num_sink_tokens, second.num_sink_tokens) == (0, 4)
        ids = [next(part.chunk_id for part in request.parts if part.chunk_id) for request in (first, second)]
        assert ids[0] != ids[1], "a chunk behind sinks has other keys and values"
        assert b.requests == [], "its ids are the old ones"


async def test_models_are_listed_with_their_profile_and_why_linked_is_not_a_mode(model: Path) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], served=served_model(profile="link4-12345678", policy="link:4")) as w:

        async def listed() -> gateway_pb2.ModelInfo:
            (info,) = (await w.stub.ListModels(gateway_pb2.ListModelsRequest())).models
            return info

        both = [common_pb2.REUSE_MODE_EXACT, common_pb2.REUSE_MODE_LINKED]
        info = await listed()
        assert (info.profile, info.policy, list(info.modes)) == ("link4-12345678", "link:4", both)
        assert (info.linked_refusal, info.can_force_linked) == ("", False)
        await serve_as(w, a, **FORBIDS)
        info = await listed()
        assert (info.profile, list(info.modes)) == ("link32-00c0ffee", [common_pb2.REUSE_MODE_EXACT])
        assert (info.linked_refusal, info.can_force_linked) == (REFUSAL, True)
        await serve_as(w, a, **CANNOT)
        info = await listed()
        assert list(info.modes) == [common_pb2.REUSE_MODE_EXACT]
        assert (info.linked_refusal, info.can_force_linked) == (CANNOT["linked_refusal"], False)


def test_a_node_of_a_release_without_profiles_serves_under_the_default() -> None:
    (model,) = models_of([record("old")])
    assert (model.profile, model.linked_refusal, model.key.num_sink_tokens) == ("default", "", 0)
    model.check_linked(force_linked=False)


def test_what_is_said_of_linked_is_said_by_the_nodes_that_decide_it() -> None:
    allows = served_model(profile="link4-12345678", policy="link:4")
    forbids = served_model(**FORBIDS)
    (mixed,) = models_of([record("a", model=forbids), record("b", model=forbids), record("c", model=allows)])
    assert (mixed.profile, mixed.linked_refusal) == ("link4-12345678", "")
    (cannot,) = models_of([record("a", model=served_model(**CANNOT)), record("b", model=forbids)])
    assert (cannot.supports_linked, cannot.profile, cannot.linked_refusal) == (True, "link32-00c0ffee", REFUSAL)
