"""Documents are cut as the request or the gateway says, and prompt, Warm and Forget name the same chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_fakes import FINGERPRINT, MODEL, SECRET, WAIT_S, FakeDecode, served_model
from gateway_tokenizers import byte_level_tokenizer, parts_tokenizer
from gateway_worlds import World, document_part, parts_request, text_request, world
from split_worlds import paragraphs

from spolia.errors import error_from_rpc
from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.splitting import Splitter, Splitting
from spolia_gateway.config import GatewayConfig
from spolia_gateway.documents import chunks_of
from spolia_gateway.generation_request import GenerationRequest
from spolia_gateway.limits import RequestLimits
from spolia_gateway.request import CheckedRequest
from spolia_gateway.served_models import Model, ModelKey

KEY = ModelKey(MODEL, FINGERPRINT, "float32")
LARGE = Model(KEY, max_context_tokens=100_000, vocab_size=320, supports_linked=True, num_nodes=1)
TOKENIZER = parts_tokenizer(byte_level_tokenizer())
LINKED, EXACT = common_pb2.REUSE_MODE_LINKED, common_pb2.REUSE_MODE_EXACT
TEXTS = paragraphs(6, seed=11)
TEXT = "\n\n".join(TEXTS)
EDITED = "\n\n".join([*TEXTS[:2], "Another paragraph.", *TEXTS[3:]])
SPLITTERS = [int(splitter) for splitter in Splitter]


def splitting(number: int, max_tokens: int = 0) -> gateway_pb2.Splitting:
    return gateway_pb2.Splitting(splitter=gateway_pb2.Splitter.ValueType(number), max_tokens=max_tokens)


def built(
    request: gateway_pb2.GenerateRequest, *, limits: RequestLimits | None = None, default: Splitting | None = None
) -> GenerationRequest:
    checked = CheckedRequest.check(request, limits or RequestLimits(), default or Splitting())
    return checked.build(LARGE, KEY.id_space(SECRET, "t"), TOKENIZER, "t")


def linked(text: str, how: gateway_pb2.Splitting | None = None, **changes: Any) -> gateway_pb2.GenerateRequest:
    return parts_request(document_part(text), mode=LINKED, splitting=how, **changes)


def chunk_ids(request: GenerationRequest) -> list[bytes]:
    return [part.chunk_id for part in request.prompt.parts if part.chunk_id is not None]


@pytest.mark.parametrize("number", SPLITTERS)
def test_splitting_changes_no_token_of_a_prompt(number: int) -> None:
    whole, cut = built(linked(TEXT)), built(linked(TEXT, splitting(number, 32)))
    assert cut.prompt.token_ids == whole.prompt.token_ids
    ids = KEY.id_space(SECRET, "t")
    assert all(part.chunk_id == ids.local(part.token_ids) for part in cut.prompt.parts[1:])
    assert (len(chunk_ids(cut)) > 1) == (number != Splitter.DOCUMENT)


@pytest.mark.parametrize("number", SPLITTERS)
def test_splitting_changes_nothing_at_all_of_an_exact_request(number: int) -> None:
    plain = parts_request(document_part(TEXT), mode=EXACT, request_id="r")
    plain.sampling.seed = 1
    cut = parts_request(document_part(TEXT), mode=EXACT, request_id="r", splitting=splitting(number, 32))
    cut.sampling.seed = 1
    assert built(cut, limits=RequestLimits(max_chunks=1)).message() == built(plain).message()


@pytest.mark.parametrize("number", SPLITTERS)
def test_a_document_is_cut_alike_in_prompts_and_by_itself(number: int) -> None:
    how = Splitting(Splitter(number), 32)
    (chunks,) = chunks_of(
        [gateway_pb2.Document(text=TEXT)], LARGE, KEY.id_space(SECRET, "t"), TOKENIZER, "t", splitting=how
    )
    assert [chunk.chunk_id for chunk in chunks] == chunk_ids(built(linked(TEXT, splitting(number, 32))))


def test_an_edited_paragraph_has_another_id_and_the_others_keep_theirs() -> None:
    how = splitting(Splitter.PARAGRAPH, 4096)
    old, new = (chunk_ids(built(linked(text, how))) for text in (TEXT, EDITED))
    assert [a == b for a, b in zip(old, new, strict=True)] == [True, True, False, True, True, True]


def test_live_text_and_token_ids_are_never_cut() -> None:
    request = text_request(TEXT, mode=LINKED, splitting=splitting(Splitter.FIXED, 32))
    assert [part.chunk_id for part in built(request).prompt.parts] == [None, None]


def test_what_a_request_leaves_open_is_the_servers_to_say() -> None:
    server = Splitting(Splitter.FIXED, 40)
    assert chunk_ids(built(linked(TEXT), default=server)) == chunk_ids(built(linked(TEXT, splitting(4, 40))))
    longer = built(linked(TEXT, splitting(0, 80)), default=server)
    assert chunk_ids(longer) == chunk_ids(built(linked(TEXT, splitting(4, 80))))
    other = built(linked(TEXT, splitting(Splitter.PARAGRAPH)), default=server)
    assert chunk_ids(other) == chunk_ids(built(linked(TEXT, splitting(2, 40))))


@pytest.mark.parametrize(
    ("how", "field", "limit", "actual"),
    [
        (splitting(9), "splitting.splitter", "DOCUMENT, PARAGRAPH, SENTENCE, FIXED", "9"),
        (splitting(3, 31), "splitting.max_tokens", "32 … 65536", "31"),
        (splitting(0, 65537), "splitting.max_tokens", "32 … 65536", "65537"),
        (splitting(1, 1), "splitting.max_tokens", "32 … 65536", "1"),
    ],
)
@pytest.mark.parametrize("mode", [LINKED, EXACT])
def test_a_splitting_that_cannot_be_is_named(
    mode: common_pb2.ReuseMode.ValueType, how: gateway_pb2.Splitting, field: str, limit: str, actual: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        CheckedRequest.check(parts_request(document_part("a"), mode=mode, splitting=how), RequestLimits())
    assert (caught.value.field, caught.value.limit, caught.value.actual) == (field, limit, actual)
    assert field in caught.value.message


def test_more_chunks_than_a_request_may_have_are_refused_over_all_its_documents() -> None:
    how = splitting(Splitter.PARAGRAPH, 4096)
    request = parts_request(document_part(TEXT), document_part(EDITED), mode=LINKED, splitting=how)
    assert len(chunk_ids(built(request, limits=RequestLimits(max_chunks=12)))) == 12
    with pytest.raises(InvalidRequest) as caught:
        built(request, limits=RequestLimits(max_chunks=11))
    assert (caught.value.field, caught.value.limit) == ("splitting", "11 chunks")
    with pytest.raises(InvalidRequest) as caught:
        chunks_of(
            [part.document for part in request.parts],
            LARGE,
            KEY.id_space(SECRET, "t"),
            TOKENIZER,
            "t",
            splitting=Splitting(Splitter.PARAGRAPH),
            limits=RequestLimits(max_chunks=11),
        )
    assert (caught.value.field, caught.value.limit) == ("splitting", "11 chunks")


@pytest.mark.parametrize(
    ("name", "value"), [("splitter", "chapter"), ("split_max_tokens", 31), ("max_chunks", 0), ("max_chunks", 4097)]
)
def test_a_bad_setting_stops_the_start_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        GatewayConfig(**{name: value})


async def warm(w: World, *texts: str, how: gateway_pb2.Splitting | None = None) -> list[gateway_pb2.WarmResponse]:
    request = gateway_pb2.WarmRequest(documents=[gateway_pb2.Document(text=text) for text in texts], splitting=how)
    responses = [response async for response in w.stub.Warm(request, timeout=WAIT_S)]
    return sorted(responses, key=lambda response: response.document_index)


ROOMY = {"num_prefills": 1, "served": served_model(max_context_tokens=8192)}


@pytest.mark.parametrize("number", SPLITTERS)
async def test_warm_prompt_and_forget_name_the_same_chunks(model: Path, number: int) -> None:
    a, how = FakeDecode("a"), splitting(number, 64)
    async with world(model, decodes=[a], **ROOMY) as w:
        (done,) = await warm(w, TEXT, how=how)
        (prefill,) = w.prefills.values()
        await w.generate(linked(TEXT, how))
        named = [part.chunk_id for part in a.requests[0].parts if part.chunk_id]
        assert set(named) == set(prefill.compiled)
        assert (done.num_chunks, done.num_computed_chunks) == (len(named), len(prefill.compiled))
        assert done.num_tokens == sum(len(part.token_ids) for part in a.requests[0].parts if part.chunk_id)
        assert done.size_bytes == sum(w.store.objects.values()) == 64 * done.num_tokens
        request = gateway_pb2.ForgetRequest(documents=[gateway_pb2.Document(text=TEXT)], splitting=how)
        dropped = await w.stub.Forget(request, timeout=WAIT_S)
        assert dropped.num_stored_dropped == len(prefill.compiled)
        assert not w.store.objects
        assert set(a.drops[0].chunk_ids) == set(named)


async def test_warming_an_edited_document_computes_what_was_edited(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], splitter="paragraph", split_max_tokens=4096, **ROOMY) as w:
        (first,) = await warm(w, TEXT)
        assert (first.num_chunks, first.num_computed_chunks, first.already_stored) == (6, 6, False)
        (edited,) = await warm(w, EDITED)
        assert (edited.num_chunks, edited.num_computed_chunks, edited.already_stored) == (6, 1, False)
        (again,) = await warm(w, EDITED)
        assert (again.num_computed_chunks, again.already_stored) == (0, True)
        assert (again.size_bytes, again.num_tokens) == (edited.size_bytes, edited.num_tokens)


async def test_a_chunk_of_several_documents_is_computed_and_counted_once(model: Path) -> None:
    how = splitting(Splitter.PARAGRAPH, 4096)
    async with world(model, decodes=[FakeDecode("a")], **ROOMY) as w:
        first, second, repeated = await warm(w, TEXT, EDITED, f"{TEXTS[0]}\n\n{TEXTS[0]}\n\n", how=how)
        assert [r.num_computed_chunks for r in (first, second, repeated)] == [6, 1, 0]
        assert [r.already_stored for r in (first, second, repeated)] == [False, False, True]
        assert (repeated.num_chunks, repeated.elapsed_ms) == (2, 0)
        (prefill,) = w.prefills.values()
        assert len(prefill.compiled) == 7


async def test_a_document_is_done_when_its_last_chunk_is(model: Path) -> None:
    how = splitting(Splitter.PARAGRAPH, 4096)
    async with world(model, decodes=[FakeDecode("a")], warm_concurrency=1, **ROOMY) as w:
        documents = [gateway_pb2.Document(text=text) for text in (TEXT, TEXTS[0] + "\n\n")]
        request = gateway_pb2.WarmRequest(documents=documents, splitting=how)
        order = [response.document_index async for response in w.stub.Warm(request, timeout=WAIT_S)]
        assert order == [1, 0], "the second is the first's first chunk"


@pytest.mark.parametrize("how", [splitting(9), splitting(2, 5)])
async def test_a_bad_splitting_reaches_no_node(model: Path, how: gateway_pb2.Splitting) -> None:
    a = FakeDecode("a")
    async with world(model, decodes=[a], **ROOMY) as w:
        documents = [gateway_pb2.Document(text=TEXT)]
        for call in (
            w.stub.Generate(linked(TEXT, how), timeout=WAIT_S).read(),
            w.stub.Warm(gateway_pb2.WarmRequest(documents=documents, splitting=how), timeout=WAIT_S).read(),
            w.stub.Forget(gateway_pb2.ForgetRequest(documents=documents, splitting=how), timeout=WAIT_S),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = error_from_rpc(caught.value)
            assert isinstance(error, InvalidRequest)
            assert error.field.startswith("splitting.")
        (prefill,) = w.prefills.values()
        assert [a.requests, a.drops, prefill.starts, prefill.drops] == [[], [], [], []]


async def test_a_limit_on_chunks_is_told_by_the_gateway(model: Path) -> None:
    async with world(model, decodes=[FakeDecode("a")], max_chunks=3, **ROOMY) as w:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await w.stub.Generate(linked(TEXT, splitting(2)), timeout=WAIT_S).read()
        error = error_from_rpc(caught.value)
        assert (error.field, error.limit) == ("splitting", "3 chunks")
