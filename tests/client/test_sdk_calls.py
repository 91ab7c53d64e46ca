"""Laws of every call, for the blocking client and its asyncio twin."""

from __future__ import annotations

import dataclasses
import pickle
import time
from typing import Any

import pytest
from fake_gateway import PATIENCE_S, Call, FakeGateway, Hang, delta, finish

from spolia import (
    ChatMessage,
    ChunkKind,
    Document,
    Forgotten,
    InternalError,
    InvalidRequest,
    MissReason,
    Model,
    NotSupported,
    ReuseMode,
    Splitter,
    SplitterName,
    SpoliaError,
    TierDropped,
    TokenIds,
    TokenSource,
    Transfer,
    WarmedDocument,
    errors,
)
from spolia.requests import DOCUMENT_BATCH_BYTES
from spolia.v1 import common_pb2
from spolia_core.reuse import FinishReason


def test_an_answer_is_the_sum_of_its_deltas(call: Call) -> None:
    result = call("generate", "Say hello")
    assert result.text == "Héllo"
    assert result.token_ids == (5, 6, 7, 8)
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.num_prompt_tokens, result.num_generated_tokens, result.seed) == (140, 4, 7)
    assert 0 < result.ttft_ms <= result.e2e_ms


def test_an_answer_says_what_was_reused_and_what_moved(call: Call) -> None:
    reuse = call("generate", "Say hello").reuse
    assert reuse.mode is ReuseMode.LINKED
    assert reuse.sources[TokenSource.DEVICE] == 72
    assert reuse.num_reused_tokens == 72 + 40
    assert reuse.num_link_tokens == 16
    assert reuse.transfers == (Transfer("grpc", 1000, 200, 30),)
    assert reuse.bytes_moved == 1230
    assert (reuse.misses[0].kind, reuse.misses[0].reason) == (ChunkKind.LOCAL, MissReason.STORE_LATE)
    assert reuse.nodes == ("decode-1", "prefill-1")


def test_an_answer_can_be_kept_in_any_form(call: Call) -> None:
    result = call("generate", "Say hello")
    assert pickle.loads(pickle.dumps(result)) == result
    assert dataclasses.asdict(result)["reuse"]["sources"][TokenSource.DEVICE] == 72


@pytest.mark.parametrize(
    ("options", "kind", "arrives"),
    [
        ({"json_schema": {"type": "string", "const": "é"}}, "json_schema", '{"type": "string", "const": "é"}'),
        ({"json_schema": '{"type":  "string"}'}, "json_schema", '{"type":  "string"}'),
        ({"json_object": True}, "json_object", common_pb2.JsonObject()),
        ({"regex": "[0-9]+"}, "regex", "[0-9]+"),
        ({"choices": ("yes", "no")}, "choices", common_pb2.Choices(texts=["yes", "no"])),
        ({"lark": 'start: "a"'}, "lark", 'start: "a"'),
        ({}, None, None),
    ],
)
def test_a_constraint_arrives_as_it_was_given(
    options: Any, kind: str | None, arrives: object, call: Call, gateway: FakeGateway
) -> None:
    call("generate", "Who?", **options)
    sampling = gateway.requests[0].sampling
    assert sampling.WhichOneof("constraint") == kind
    assert kind is None or getattr(sampling, kind) == arrives


def test_parts_and_options_arrive_as_they_were_given(call: Call, gateway: FakeGateway) -> None:
    call(
        "generate",
        ["Read: ", Document("a page", name="page.md"), TokenIds([1, 2])],
        mode="linked",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        seed=2**64 - 1,
        stop="\n",
        ignore_eos=True,
        force_linked=True,
        no_bos=True,
        cache_salt="mine too",
        request_id="mine",
    )
    (request,) = gateway.requests
    assert [part.WhichOneof("part") for part in request.parts] == ["text", "document", "token_ids"]
    assert (request.parts[1].document.text, request.parts[1].document.name) == ("a page", "page.md")
    assert list(request.parts[2].token_ids.ids) == [1, 2]
    assert (request.mode, request.force_linked, request.no_bos, request.request_id) == (2, True, True, "mine")
    assert request.cache_salt == "mine too"
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.seed, sampling.ignore_eos) == (9, 3, 2**64 - 1, True)
    assert (sampling.temperature, sampling.top_p) == pytest.approx((0.5, 0.9))
    assert list(sampling.stop) == ["\n"]
    assert gateway.metadata["x-request-id"] == "mine"


def test_what_is_not_given_is_left_to_the_gateway(call: Call, gateway: FakeGateway) -> None:
    result = call("generate", "Hi")
    (request,) = gateway.requests
    assert not request.sampling.HasField("seed")
    assert not request.sampling.HasField("max_tokens")
    assert request.mode == ReuseMode.EXACT
    assert request.request_id == result.request_id != ""


@pytest.mark.parametrize("kind", errors.ERROR_KINDS.values(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("method", "argument"), [("generate", "Hi"), ("warm", "Hi"), ("tokenize", "Hi")])
def test_every_error_arrives_as_its_class_with_field_and_limit(
    kind: type[SpoliaError], method: str, argument: str, call: Call, gateway: FakeGateway
) -> None:
    gateway.failure = kind("no", field="parts[0].text", limit="10", actual="11", retry_after_ms=250)
    with pytest.raises(kind, match=r"^no$") as caught:
        call(method, argument)
    error = caught.value
    assert (error.field, error.limit, error.actual, error.retry_after_ms) == ("parts[0].text", "10", "11", 250)


def test_an_error_after_some_tokens_is_raised_not_swallowed(call: Call, gateway: FakeGateway) -> None:
    gateway.script = [delta("He", [5], 0, 0), errors.Busy("full", retry_after_ms=10)]
    with pytest.raises(errors.Busy):
        call("generate", "Hi")


def test_an_error_after_the_finish_does_not_lose_the_answer(call: Call, gateway: FakeGateway) -> None:
    gateway.script = [delta("He", [5], 0, 0), finish(1), errors.Unavailable("stopping")]
    assert call("generate", "Hi").text == "He"


@pytest.mark.parametrize(
    ("script", "field"),
    [
        ([delta("a", [5], 0, 0), delta("b", [6], 2, 1), finish(3)], "token"),
        ([delta("a", [5], 0, 0), delta("a", [5], 0, 0), finish(1)], "token"),
        ([delta("é", [5], 0, 0), delta("b", [6], 1, 2), finish(2)], "code point"),
        ([delta("a", [5], 0, 0), finish(2)], "token"),
        ([delta("a", [5], 0, 0)], ""),
    ],
    ids=["lost", "doubled", "text lost", "short", "no finish"],
)
def test_a_stream_that_loses_or_doubles_anything_is_an_error(
    script: list[Any], field: str, call: Call, gateway: FakeGateway
) -> None:
    gateway.script = script
    with pytest.raises(InternalError) as caught:
        call("generate", "Hi")
    assert caught.value.field == field


def test_values_of_a_newer_gateway_do_not_lose_the_answer(call: Call, gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), finish(1, reason=99)]
    result = call("generate", "Hi")
    assert result.text == "a"
    assert result.finish_reason.name == "UNKNOWN_99"


@pytest.mark.parametrize(("method", "argument"), [("generate", "Hi"), ("warm", "Hi"), ("forget", "Hi")])
def test_every_call_ends_with_its_time_limit(method: str, argument: str, call: Call, gateway: FakeGateway) -> None:
    gateway.hang = True
    begin_s = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        call(method, argument, timeout_s=1.0)
    assert time.monotonic() - begin_s < PATIENCE_S / 2
    assert gateway.caller_gone.wait(PATIENCE_S)


def test_the_limit_of_a_stream_holds_between_tokens_too(call: Call, gateway: FakeGateway) -> None:
    gateway.script = [delta("a", [5], 0, 0), Hang()]
    with pytest.raises(errors.DeadlineExceeded):
        call("generate", "Hi", timeout_s=0.3)


def test_warming_reports_each_document_and_returns_them_in_order(call: Call, gateway: FakeGateway) -> None:
    seen: list[WarmedDocument] = []
    warmed = call(
        "warm", [Document("one", name="1.md"), "three", Document("five!", name="5.md")], on_progress=seen.append
    )
    assert [w.name for w in warmed] == ["1.md", "", "5.md"]
    assert [w.num_tokens for w in warmed] == [3, 5, 5]
    assert [w.already_stored for w in warmed] == [True, False, False]
    assert [w.index for w in seen] == [2, 1, 0]


def test_a_large_corpus_is_warmed_in_several_messages(call: Call, gateway: FakeGateway) -> None:
    texts = ["x" * (DOCUMENT_BATCH_BYTES // 2) for _ in range(5)]
    warmed = call("warm", (text for text in texts))
    assert [len(request.documents) for request in gateway.requests] == [1, 1, 1, 1, 1]
    assert [w.index for w in warmed] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("splitter", ["sentence", Splitter.SENTENCE])
@pytest.mark.parametrize("method", ["generate", "warm", "forget"])
def test_a_splitter_arrives_as_it_was_given(
    method: str, splitter: SplitterName, call: Call, gateway: FakeGateway
) -> None:
    call(method, Document("one"), splitter=splitter, split_max_tokens=256)
    call(method, Document("one"), split_max_tokens=64)
    call(method, Document("one"), splitter="document")
    call(method, Document("one"))
    chosen = [request.splitting for request in gateway.requests]
    assert [(each.splitter, each.max_tokens) for each in chosen] == [(3, 256), (0, 64), (1, 0), (0, 0)]


@pytest.mark.parametrize("method", ["generate", "warm", "forget"])
def test_a_salt_arrives_as_it_was_given(method: str, call: Call, gateway: FakeGateway) -> None:
    call(method, Document("one"), cache_salt="mine")
    call(method, Document("one"))
    assert [request.cache_salt for request in gateway.requests] == ["mine", ""]


def test_a_salt_goes_with_every_message_of_a_large_corpus(call: Call, gateway: FakeGateway) -> None:
    for method in ("warm", "forget"):
        call(method, ["x" * (DOCUMENT_BATCH_BYTES // 2)] * 2, cache_salt="mine")
    assert [request.cache_salt for request in gateway.requests] == ["mine"] * 4


def test_a_warmed_document_says_how_many_chunks_it_has(call: Call) -> None:
    assert [(w.num_chunks, w.num_computed_chunks) for w in call("warm", ["a", "b"])] == [(3, 0), (3, 2)]


def test_small_documents_share_a_message(call: Call, gateway: FakeGateway) -> None:
    call("warm", ["a", "b", "c"])
    assert len(gateway.requests) == 1


def test_forgetting_sums_what_was_dropped(call: Call) -> None:
    assert call("forget", ["a", Document("b")]) == Forgotten(2, 200, 1, (TierDropped("disk", 2, 200),))


def test_a_lone_string_is_one_document(call: Call, gateway: FakeGateway) -> None:
    call("forget", "abc")
    assert [document.text for document in gateway.requests[0].documents] == ["abc"]


def test_tokenize_returns_ids(call: Call) -> None:
    assert call("tokenize", "ab") == [97, 98]


def test_models_and_their_modes_are_listed(call: Call) -> None:
    assert call("models") == [Model("tiny", 512, 100, b"\2" * 32, (ReuseMode.EXACT, ReuseMode.LINKED))]


def test_the_cluster_shows_nodes_and_load(call: Call) -> None:
    cluster = call("cluster")
    assert cluster.directory_reachable
    (node,) = cluster.nodes
    assert (node.node_id, node.role, node.model, node.num_held_chunks) == ("decode-1", "decode", "tiny", 1)
    assert (node.num_running, node.num_waiting, node.available_blocks, node.total_blocks) == (2, 1, 46, 64)
    assert (node.free_blocks, node.referenced_blocks, node.cached_blocks) == (34, 13, 12)
    assert (node.in_transfer_blocks, node.lent_blocks) == (3, 2)


def test_a_chat_becomes_parts_with_its_documents(call: Call, gateway: FakeGateway) -> None:
    chat = [ChatMessage("system", "Read."), ChatMessage("user", "Hi")]
    about = Document("A page.", name="page")
    assert call("render_chat", chat, [about]) == [about, "<system>Read.<user>Hi<assistant>"]
    assert call("render_chat", iter(chat)) == ["<system>Read.<user>Hi<assistant>"]
    gateway.has_template = False
    with pytest.raises(NotSupported) as caught:
        call("render_chat", chat)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([ChatMessage("user", "Hi"), ChatMessage("user", 5)], "messages[1].content"),  # type: ignore[arg-type]  # wrong on purpose
    ],
)
def test_a_chat_that_cannot_be_sent_is_refused_by_name(
    messages: Any, field: str, call: Call, gateway: FakeGateway
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call("render_chat", messages)
    assert caught.value.field == field
    assert gateway.chats == []
