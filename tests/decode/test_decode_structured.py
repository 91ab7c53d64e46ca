"""Constraints on a decode node: every sample, replays, preemption, and refusal before anything is held."""

from __future__ import annotations

import json

import pytest
from tiny_answers import SampleAnswers, ask_samples, calling, generate_request
from tiny_cluster import World, count_calls, doc, eventually, prompt_of, tokens

from spolia.v1 import common_pb2, decode_pb2
from spolia_core.constraint import Constraint
from spolia_core.errors import InvalidRequest, NotSupported, SpoliaError
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.extent import BlockState

SCHEMA = Constraint.json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 8, "maxLength": 24},
            "size": {"type": "integer", "minimum": 0, "maximum": 9999},
            "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 2, "maxItems": 4},
        },
        "required": ["name", "size", "tags"],
        "additionalProperties": False,
    }
)
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=150, num_samples=4, constraint=SCHEMA)
PARTS = [tokens(4), doc(150, 1), tokens(30, 2)]


def check(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "size", "tags"]
    assert 8 <= len(value["name"]) <= 24
    assert 0 <= value["size"] <= 9999
    assert 2 <= len(value["tags"]) <= 4
    assert set(value["tags"]) <= {"red", "blue"}


@pytest.mark.parametrize("mode", list(ReuseMode))
async def test_every_sample_of_a_random_model_keeps_the_schema(world: World, mode: ReuseMode) -> None:
    await world.store()
    await world.prefill()
    decode = await world.decode(local_prefill_tokens=1)
    answers = await ask_samples(decode, PARTS, DRAWN, mode)
    assert answers.reasons == [common_pb2.FINISH_REASON_EOS] * 4
    for index in range(4):
        check(answers.texts[index])
    assert len(set(answers.texts.values())) == 4
    oracle = world.oracle()
    alone = oracle.generate_samples(prompt_of(PARTS, oracle.ids), 4, DRAWN, mode=mode)
    assert [answers.token_ids[index] for index in range(4)] == [list(each.token_ids) for each in alone]


async def test_samples_are_resumed_each_where_it_stood_in_its_grammar(world: World) -> None:
    decode = await world.decode()
    whole = await ask_samples(decode, PARTS, DRAWN)
    # One is over, one is inside a string, one has a token, one has none.
    stood = [whole.token_ids[0], whole.token_ids[1][:14], whole.token_ids[2][:1], []]
    resume = decode_pb2.Resume(
        samples=[decode_pb2.ResumedSample(token_ids=ids, num_text_code_points=len(ids)) for ids in stood[:3]]
    )
    there = await world.decode()
    rest = await ask_samples(there, PARTS, DRAWN, resume=resume)
    assert [stood[i] + rest.token_ids[i] for i in range(4)] == [whole.token_ids[i] for i in range(4)]
    assert rest.reasons == [common_pb2.FINISH_REASON_EOS] * 4
    for index in range(4):
        check(whole.texts[index][: len(stood[index])] + rest.texts[index])


async def test_samples_that_are_preempted_keep_their_place_in_the_grammar(world: World) -> None:
    decode = await world.decode(num_blocks=24)
    many = SamplingParams(temperature=1.0, seed=3, max_tokens=150, num_samples=8, constraint=SCHEMA)
    answers = await ask_samples(decode, PARTS, many)
    assert decode.batch.num_preempted > 0
    assert answers.reasons == [common_pb2.FINISH_REASON_EOS] * 8
    for index in range(8):
        check(answers.texts[index])


async def test_constrained_and_free_requests_decode_side_by_side(world: World) -> None:
    decode = await world.decode(deterministic=True)
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=60)
    alone = await ask_samples(decode, PARTS, free)
    held = await ask_samples(decode, PARTS, SamplingParams(temperature=1.0, seed=5, max_tokens=150, constraint=SCHEMA))
    async with (
        calling(decode, generate_request(decode, PARTS, free, request_id="free")) as first,
        calling(decode, generate_request(decode, PARTS, DRAWN, request_id="held")) as second,
    ):
        beside, other = SampleAnswers(), SampleAnswers()
        async for response in first:
            beside.take(response)
        async for response in second:
            other.take(response)
    assert beside.token_ids == alone.token_ids, "the same to the bit, whoever is served beside it"
    check(held.texts[0])
    for text in other.texts.values():
        check(text)


async def test_a_constraint_that_cannot_be_enforced_is_refused_before_anything_is_held(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = await world.decode()
    allocated = count_calls(monkeypatch, decode.engine.pool, "allocate")
    bad = [
        Constraint.json_schema({"type": "array", "uniqueItems": True}),
        Constraint.regex("a(?=b)"),
        Constraint.lark("start: other"),
    ]
    for constraint in bad:
        with pytest.raises((InvalidRequest, NotSupported), match="cannot be enforced") as caught:
            await ask_samples(decode, PARTS, SamplingParams(constraint=constraint))
        assert caught.value.field == constraint.field
    for wrong in (Constraint.json_schema("{"), Constraint.one_of(["a", "a"])):
        with pytest.raises(InvalidRequest) as caught:
            await ask_samples(decode, PARTS, SamplingParams(constraint=wrong))
        assert caught.value.field == wrong.field
    assert allocated == []
    assert decode.admission.num_running == decode.admission.num_waiting == 0
    check((await ask_samples(decode, PARTS, SamplingParams(max_tokens=150, constraint=SCHEMA))).texts[0])
    assert allocated, "what was counted is what a request takes"


async def test_a_grammar_that_grows_too_large_ends_its_own_request_only(world: World) -> None:
    decode = await world.decode()
    wild = Constraint.regex("((a{1,1000}){1,1000}b?){1,1000}")
    with pytest.raises(SpoliaError, match=r"sampling\.regex"):
        await ask_samples(decode, PARTS, SamplingParams(max_tokens=1000, temperature=1.0, constraint=wild))
    check((await ask_samples(decode, PARTS, SamplingParams(max_tokens=150, constraint=SCHEMA))).texts[0])
    await eventually(lambda: decode.admission.is_idle)


async def test_leaving_in_the_middle_frees_everything(world: World) -> None:
    decode = await world.decode()
    async with calling(decode, generate_request(decode, PARTS, DRAWN)) as call:
        async for response in call:
            assert response.HasField("delta")
            break
    await eventually(lambda: decode.admission.is_idle)
    await eventually(lambda: decode.engine.pool.counts()[BlockState.REFERENCED] == 0)
