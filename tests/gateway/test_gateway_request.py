"""Bad input gets a precise error before anything is held; good input becomes the same ids everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import FINGERPRINT, MODEL, SECRET, record, served_model
from gateway_tokenizers import byte_level_tokenizer, parts_tokenizer, sentencepiece_tokenizer
from gateway_worlds import document_part, ids_part, parts_request, text_request

from spolia.v1 import common_pb2, gateway_pb2
from spolia_core.errors import InvalidRequest, NotFound, NotSupported, SpoliaError, Unavailable
from spolia_core.ids import IdSpace
from spolia_core.reuse import ReuseMode
from spolia_gateway.documents import DocumentChunk, check_documents, chunks_of
from spolia_gateway.generation_request import GenerationRequest
from spolia_gateway.limits import RequestLimits
from spolia_gateway.request import CheckedRequest
from spolia_gateway.served_models import Model, ModelKey, ServedModels, check_model_name, choose_model, models_of
from spolia_gateway.tokenizer import Form, PartTokenizer

LIMITS = RequestLimits(max_prompt_bytes=1000, max_documents=2, max_parts=4)
KEY = ModelKey(MODEL, FINGERPRINT, "float32")
MODEL_OF = Model(KEY, max_context_tokens=32, vocab_size=320, supports_linked=True, num_nodes=1)
BOS = 0


TOKENIZER = parts_tokenizer(byte_level_tokenizer())


def built(
    request: gateway_pb2.GenerateRequest, *, model: Model = MODEL_OF, tenant: str = "t", tokenizer: Any = TOKENIZER
) -> GenerationRequest:
    ids = model.key.id_space(SECRET, tenant)
    return CheckedRequest.check(request, LIMITS).build(model, ids, tokenizer, tenant)


def test_ids_count_for_how_long_a_prompt_takes_and_not_as_text() -> None:
    """What is short is prepared on the event loop: a long prompt of ids alone must not pass for that."""
    checked = CheckedRequest.check(parts_request(document_part("é"), ids_part(*[1] * 200)), LIMITS)
    assert (checked.num_text_bytes, checked.num_content_bytes) == (2, 802)


def sampled(**values: Any) -> gateway_pb2.GenerateRequest:
    return text_request("the stones", sampling=common_pb2.SamplingParams(**values))


# request, the field to blame, and what its limit and actual must say
INVALID = [
    (parts_request(), "parts", "≥ 1", "0"),
    (parts_request(gateway_pb2.PromptPart()), "parts[0]", "one of text, document, token_ids", "none"),
    (text_request("a", ""), "parts[1].text", "≥ 1 byte", "0 bytes"),
    (parts_request(document_part("")), "parts[0].document.text", "≥ 1 byte", "0 bytes"),
    (parts_request(ids_part()), "parts[0].token_ids", "≥ 1 token", "0"),
    (text_request(*"abcde"), "parts", "4", "5"),
    (parts_request(*[document_part("a")] * 3), "parts.document", "2", "3"),
    (text_request("é" * 501), "parts", "1000 bytes", "1002 bytes"),
    (parts_request(ids_part(*[1] * 251)), "parts", "1000 bytes", "1004 bytes"),
    (parts_request(ids_part(1, 320)), "parts[0].token_ids", "0 … 319", "320"),
    (parts_request(ids_part(*[5] * 31)), "parts", "32 tokens", "32 tokens"),
    (text_request("a", request_id="x" * 129), "request_id", "128 bytes", "129 bytes"),
    (text_request("a", request_id="line\nbreak"), "request_id", "printable ASCII", "line\nbreak"),
    (text_request("a", request_id="é"), "request_id", "printable ASCII", "é"),
    (text_request("a", mode=7), "mode", "EXACT, LINKED", "7"),
    (sampled(temperature=-1.0), "sampling.temperature", "0 … 100", "-1.0"),
    (sampled(temperature=float("nan")), "sampling.temperature", "0 … 100", "nan"),
    (sampled(temperature=float("inf")), "sampling.temperature", "0 … 100", "inf"),
    (sampled(top_p=0.0), "sampling.top_p", "(0, 1]", "0.0"),
    (sampled(top_p=1.5), "sampling.top_p", "(0, 1]", "1.5"),
    (sampled(max_tokens=0), "sampling.max_tokens", "≥ 1", "0"),
    (sampled(stop=["a"] * 17), "sampling.stop", "≤ 16 strings", "17"),
    (sampled(stop=[""]), "sampling.stop", "1 … 256 bytes each", "0"),
    (sampled(stop=["é" * 129]), "sampling.stop", "1 … 256 bytes each", "258"),
    (sampled(json_schema="[1]"), "sampling.json_schema", "a JSON object", "[1]"),
    (sampled(json_schema=" " * 262145), "sampling.json_schema", "1 … 262144 bytes", "262145 bytes"),
    (sampled(json_schema="{}", ignore_eos=True), "sampling.ignore_eos", "false beside sampling.json_schema", "True"),
    (sampled(regex="é" * 4097), "sampling.regex", "1 … 8192 bytes", "8194 bytes"),
    (sampled(choices=common_pb2.Choices()), "sampling.choices", "1 … 1024 texts", "0"),
    (sampled(lark=""), "sampling.lark", "1 … 262144 bytes", "0 bytes"),
]


@pytest.mark.parametrize(("request_", "field", "limit", "actual"), INVALID)
def test_bad_input_is_named_with_field_limit_and_value(
    request_: gateway_pb2.GenerateRequest, field: str, limit: str, actual: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        built(request_)
    error = caught.value
    assert (error.field, error.limit, error.actual) == (field, limit, actual)
    assert field.partition("[")[0].partition(".")[0] in error.message or "prompt" in error.message


def test_what_fits_the_limits_exactly_is_taken() -> None:
    built(text_request(*"abcd", request_id="x" * 128))
    built(parts_request(*[document_part("a")] * 2))
    built(parts_request(ids_part(*[5] * 30)))
    built(sampled(temperature=100.0, top_p=1.0, top_k=2**32 - 1, stop=["a" * 256] * 16, seed=2**64 - 1))
    LIMITS.check_bytes([999, 1], "parts")


def test_a_constraint_is_handed_on_as_it_was_stated() -> None:
    for sampling in (
        common_pb2.SamplingParams(json_schema='{"type": "string"}'),
        common_pb2.SamplingParams(json_object=common_pb2.JsonObject()),
        common_pb2.SamplingParams(regex="a(?=b)"),  # what only the grammar library can tell the decode node says
        common_pb2.SamplingParams(choices=common_pb2.Choices(texts=["yes", "no"])),
        common_pb2.SamplingParams(lark='start: "a"'),
    ):
        sent = built(text_request("a", sampling=sampling)).message().sampling
        kind = sampling.WhichOneof("constraint")
        assert sent.WhichOneof("constraint") == kind
        assert getattr(sent, kind) == getattr(sampling, kind)


def test_max_tokens_that_do_not_fit_are_refused_with_both_numbers() -> None:
    request = parts_request(ids_part(*[5] * 10), no_bos=True)
    request.sampling.max_tokens = 22
    assert built(request).sampling.max_tokens == 22
    request.sampling.max_tokens = 23
    with pytest.raises(InvalidRequest) as caught:
        built(request)
    assert caught.value.field == "sampling.max_tokens"
    for number in ("10", "23", "32"):
        assert number in caught.value.message


def test_a_default_max_tokens_is_what_the_context_leaves() -> None:
    request = parts_request(ids_part(*[5] * 10), no_bos=True)
    assert built(request).sampling.max_tokens == 22
    large = Model(KEY, max_context_tokens=1000, vocab_size=320, supports_linked=True, num_nodes=1)
    assert built(request, model=large).sampling.max_tokens == 256


def test_an_unset_seed_is_drawn_and_a_set_one_kept() -> None:
    seeds = {built(text_request("a")).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert built(sampled(seed=0)).sampling.seed == 0


def test_a_request_without_id_gets_one_of_its_own() -> None:
    made = {built(text_request("a")).request_id for _ in range(8)}
    assert len(made) == 8
    assert built(text_request("a", request_id="mine")).request_id == "mine"


def test_bos_is_a_live_part_of_its_own_before_the_first() -> None:
    linked = common_pb2.REUSE_MODE_LINKED
    first = built(parts_request(document_part("the stones"), mode=linked)).prompt.parts
    assert (first[0].token_ids, first[0].chunk_id) == ((BOS,), None)
    assert first[1].chunk_id is not None
    assert BOS not in first[1].token_ids
    without = built(parts_request(document_part("the stones"), mode=linked, no_bos=True)).prompt.parts
    assert without == first[1:]


@pytest.mark.parametrize("part", [ids_part(BOS, 5), gateway_pb2.PromptPart(text="<s>the stones")])
def test_a_bos_the_caller_wrote_is_not_doubled(part: gateway_pb2.PromptPart) -> None:
    prompt = built(parts_request(part)).prompt
    assert prompt.token_ids[0] == BOS
    assert prompt.token_ids[1] != BOS
    assert len(prompt.parts) == 1


def test_token_ids_are_taken_as_they_are() -> None:
    parts = built(parts_request(ids_part(7, 1, 319), ids_part(0))).prompt.parts
    assert [part.token_ids for part in parts] == [(BOS,), (7, 1, 319), (0,)]


def test_only_linked_requests_name_chunks() -> None:
    parts = [gateway_pb2.PromptPart(text="read "), document_part("the stones"), document_part("are cut")]
    exact = built(parts_request(*parts, mode=common_pb2.REUSE_MODE_EXACT))
    linked = built(parts_request(*parts, mode=common_pb2.REUSE_MODE_LINKED))
    assert exact.prompt.token_ids == linked.prompt.token_ids
    assert [part.chunk_id for part in exact.prompt.parts] == [None] * 4
    assert all(not part.chunk_id for part in exact.message().parts)
    ids = KEY.id_space(SECRET, "t")
    expected = [ids.local(part.token_ids) for part in linked.prompt.parts[2:]]
    assert [part.chunk_id for part in linked.prompt.parts] == [None, None, *expected]


def test_an_unspecified_mode_is_exact() -> None:
    assert built(text_request("a")).mode is ReuseMode.EXACT


def test_a_document_has_one_id_wherever_it_stands() -> None:
    tokenizer = parts_tokenizer(sentencepiece_tokenizer("prepend"))
    parts = [document_part("the stones"), document_part("are cut"), document_part("the stones")]
    limits = RequestLimits()
    checked = CheckedRequest.check(parts_request(*parts, mode=common_pb2.REUSE_MODE_LINKED), limits)
    prompt = checked.build(MODEL_OF, KEY.id_space(SECRET, "t"), tokenizer, "t").prompt
    first, other, again = (part.chunk_id for part in prompt.parts[1:])
    assert first == again != other
    warmed = chunks_of([parts[0].document], MODEL_OF, KEY.id_space(SECRET, "t"), tokenizer, "t")
    assert warmed[0][0].chunk_id == first


def test_only_the_head_of_a_prompt_has_a_dummy_prefix() -> None:
    tokenizer = parts_tokenizer(sentencepiece_tokenizer("prepend"))
    parts = built(text_request("stones", "stones"), tokenizer=tokenizer).prompt.parts
    assert parts[1].token_ids == tokenizer.encode("stones", Form.HEAD, tenant_id="t")
    assert parts[2].token_ids == tokenizer.encode("stones", Form.BODY, tenant_id="t")
    assert parts[1].token_ids != parts[2].token_ids


def id_of(tenant: str, *, model: ModelKey = KEY, secret: str = SECRET) -> bytes:
    request = parts_request(document_part("the stones"), mode=common_pb2.REUSE_MODE_LINKED)
    served = Model(model, max_context_tokens=32, vocab_size=320, supports_linked=True, num_nodes=1)
    checked = CheckedRequest.check(request, LIMITS)
    chunk_id = checked.build(served, model.id_space(secret, tenant), TOKENIZER, tenant).prompt.parts[1].chunk_id
    assert chunk_id is not None
    return chunk_id


def test_ids_differ_by_tenant_secret_model_and_dtype() -> None:
    made = [
        id_of("a"),
        id_of("b"),
        id_of("a", secret="another"),
        id_of("a", model=ModelKey(MODEL, b"\x08" * 32, "float32")),
        id_of("a", model=ModelKey(MODEL, FINGERPRINT, "bfloat16")),
    ]
    assert len(set(made)) == len(made)
    assert id_of("a") == made[0]


ID_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from spolia_gateway.served_models import Model, ModelKey, ServedModels, check_model_name, choose_model, models_of
from spolia_gateway.tokenizer import Form, PartTokenizer
tokenizer = PartTokenizer.from_model(Path(sys.argv[1]))
ids = ModelKey("tiny", bytes([7]) * 32, "float32").id_space("spolia-development", "a")
print(ids.local(tokenizer.encode("the stones", Form.DOCUMENT, tenant_id="a")).hex())
"""


def test_ids_are_equal_across_processes(model: Path) -> None:
    ids: IdSpace = KEY.id_space(SECRET, "a")
    tokenizer = PartTokenizer.from_model(model)
    here = ids.local(tokenizer.encode("the stones", Form.DOCUMENT, tenant_id="a")).hex()
    command = [sys.executable, "-c", ID_IN_ANOTHER_PROCESS, str(model)]
    there = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for _ in range(2)]
    assert there == [here, here]


def test_linked_is_refused_where_no_node_serves_it() -> None:
    exact_only = Model(KEY, max_context_tokens=32, vocab_size=320, supports_linked=False, num_nodes=1)
    request = parts_request(document_part("the stones"), mode=common_pb2.REUSE_MODE_LINKED)
    with pytest.raises(NotSupported) as caught:
        built(request, model=exact_only)
    assert caught.value.field == "mode"
    request.force_linked = True  # overrides a profile, never what the model cannot do
    with pytest.raises(NotSupported) as caught:
        built(request, model=exact_only)
    assert caught.value.field == "mode"


DOCUMENT = gateway_pb2.Document(text="the stones", name="d")
INVALID_DOCUMENTS: list[tuple[list[gateway_pb2.Document], str]] = [
    ([], "documents"),
    ([DOCUMENT] * 3, "documents"),
    ([DOCUMENT, gateway_pb2.Document(name="empty")], "documents[1].text"),
    ([gateway_pb2.Document(text="é" * 501)], "documents"),
    ([DOCUMENT, gateway_pb2.Document(text="é€" * 16, name="long")], "documents[1].text"),
]


def checked_chunks(documents: list[gateway_pb2.Document]) -> tuple[tuple[DocumentChunk, ...], ...]:
    check_documents(documents, LIMITS)
    return chunks_of(documents, MODEL_OF, KEY.id_space(SECRET, "t"), TOKENIZER, "t")


@pytest.mark.parametrize(("documents", "field"), INVALID_DOCUMENTS)
def test_bad_documents_are_named(documents: list[gateway_pb2.Document], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked_chunks(documents)
    assert caught.value.field == field
    assert caught.value.limit
    assert caught.value.actual


def test_models_are_offered_as_their_weakest_node_allows() -> None:
    nodes = [
        record("a", model=served_model(max_context_tokens=100, vocab_size=300, supports_linked=False)),
        record("b", model=served_model(max_context_tokens=50, vocab_size=320)),
        record("c", model=served_model(name="other")),
    ]
    tiny = choose_model(MODEL, models_of(nodes))
    assert (tiny.max_context_tokens, tiny.vocab_size, tiny.num_nodes) == (50, 300, 2)
    assert tiny.supports_linked
    assert [model.key.name for model in models_of(nodes)] == ["other", MODEL]


def test_the_version_on_more_nodes_is_chosen() -> None:
    newer = served_model(fingerprint=b"\x09" * 32)
    nodes = [record("a"), record("b", model=newer), record("c", model=newer)]
    assert choose_model(MODEL, models_of(nodes)).key.fingerprint == newer.fingerprint


@pytest.mark.parametrize(
    ("nodes", "words"), [([], "none is known"), ([record("a", model=served_model(name="x"))], "'x'")]
)
def test_a_model_nobody_serves_is_unavailable(nodes: list[Any], words: str) -> None:
    with pytest.raises(Unavailable, match=words):
        choose_model(MODEL, models_of(nodes))


def test_a_model_the_gateway_has_no_tokenizer_for_is_not_found() -> None:
    check_model_name("", MODEL)
    check_model_name(MODEL, MODEL)
    with pytest.raises(NotFound, match="'other'") as caught:
        check_model_name("other", MODEL)
    error: SpoliaError = caught.value
    assert (error.field, error.limit, error.actual) == ("model", MODEL, "other")


def test_what_no_context_could_hold_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartTokenizer, "encode", lambda *_, **__: pytest.fail("encoded"))
    most = 32 * (TOKENIZER.max_bytes_per_token or 0)
    with pytest.raises(InvalidRequest) as caught:
        built(text_request("x" * (most // 2), "é" * (most // 4 + 1)))
    assert (caught.value.field, caught.value.limit) == ("parts", f"{most} bytes")
    document = gateway_pb2.Document(text="x" * (most + 1))
    with pytest.raises(InvalidRequest) as caught:
        chunks_of([document], MODEL_OF, KEY.id_space(SECRET, "t"), TOKENIZER, "t")
    assert (caught.value.field, caught.value.actual) == ("documents[0].text", f"{most + 1} bytes")


def test_models_are_counted_anew_when_a_nodes_record_is_another() -> None:
    served, nodes = ServedModels(), [record("a"), record("b")]
    assert served.of(nodes) == models_of(nodes)
    assert served.of(list(nodes)) is served.of(nodes)
    for others in ([nodes[0]], [record("a", model=served_model(vocab_size=10)), nodes[1]], []):
        assert served.of(others) == models_of(others)
