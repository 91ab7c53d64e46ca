"""Several answers to one prompt: each is what it would be alone, all read one context, each resumes by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_answers import ask_samples, calling, generate_request
from tiny_cluster import World, doc, eventually, ids_of, prompt_of, tokens

from spolia.v1 import decode_pb2
from spolia_core.errors import Busy
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_engine.extent import BlockState

DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True, num_samples=3)
PARTS = [tokens(4), doc(150, 1), tokens(30, 2)]


def alone(world: World, decode: DecodeNode, mode: ReuseMode) -> list[list[int]]:
    """Each sample's tokens in a single process."""
    oracle = world.oracle()
    found = oracle.generate_samples(prompt_of(PARTS, oracle.ids), DRAWN.num_samples, DRAWN, mode=mode)
    return [list(each.token_ids) for each in found]


@pytest.mark.parametrize("mode", list(ReuseMode))
@pytest.mark.parametrize("prefills_here", [True, False])
async def test_each_sample_is_that_sample_alone(world: World, mode: ReuseMode, prefills_here: bool) -> None:
    await world.store()
    if not prefills_here:
        await world.prefill()
    decode = await world.decode(local_prefill_tokens=4096 if prefills_here else 1)
    answers = await ask_samples(decode, PARTS, DRAWN, mode)
    assert [answers.token_ids[i] for i in range(3)] == alone(world, decode, mode)
    assert [sample.num_generated_tokens for sample in answers.finish.samples] == [24] * 3
    assert answers.finish.num_generated_tokens == 72
    assert len({tuple(ids) for ids in answers.token_ids.values()}) == 3


async def test_samples_hold_the_prompt_once(world: World) -> None:
    decode = await world.decode()
    pool, budget = decode.engine.pool, decode.config.slice_tokens
    request = generate_request(decode, PARTS, SamplingParams(**{**as_dict(DRAWN), "num_samples": 16, "max_tokens": 40}))
    most, least_left = 0, budget
    assert decode.batch.slice_tokens == budget
    async with calling(decode, request) as call:
        async for _ in call:
            most = max(most, pool.counts()[BlockState.REFERENCED])
            least_left = min(least_left, decode.batch.slice_tokens)
    assert least_left == budget - 16, "what a step takes of the token budget, prompts do not get"
    prompt_blocks = pool.blocks_for(sum(len(p.token_ids) for p in request.parts))
    assert most <= prompt_blocks + 16 * pool.blocks_for(40)
    await eventually(lambda: decode.admission.is_idle)
    assert decode.batch.slice_tokens == budget


async def test_samples_are_resumed_each_where_it_stood(world: World) -> None:
    decode = await world.decode()
    whole = await ask_samples(decode, PARTS, DRAWN)
    stood = [whole.token_ids[0], whole.token_ids[1][:5], []]
    resume = decode_pb2.Resume(
        samples=[
            decode_pb2.ResumedSample(token_ids=ids, num_text_code_points=len(ids))
            for ids in stood[:2]  # the third had nothing
        ]
    )
    rest = await ask_samples(decode, PARTS, DRAWN, resume=resume)
    assert [stood[i] + rest.token_ids[i] for i in range(3)] == [whole.token_ids[i] for i in range(3)]
    assert [sample.num_generated_tokens for sample in rest.finish.samples] == [24] * 3


async def test_samples_that_are_preempted_go_on_as_if_nothing_had_been(world: World) -> None:
    decode = await world.decode(num_blocks=24)
    answers = await ask_samples(decode, PARTS, DRAWN)
    assert [answers.token_ids[i] for i in range(3)] == alone(world, decode, ReuseMode.EXACT)
    roomy = SamplingParams(**{**as_dict(DRAWN), "num_samples": 8, "max_tokens": 100})
    answers = await ask_samples(decode, PARTS, roomy)
    assert [len(ids) for ids in answers.token_ids.values()] == [100] * 8
    assert decode.batch.num_preempted > 0


async def test_an_answer_that_holds_everything_and_needs_more_is_told_so(world: World) -> None:
    decode = await world.decode(num_blocks=20)
    await ask_samples(decode, PARTS, DRAWN)  # its prompt stays, twelve blocks of which a prefix of eight is of use
    long = SamplingParams(**{**as_dict(DRAWN), "num_samples": 1, "max_tokens": 100})
    with pytest.raises(Busy, match="holds all 20 blocks"):
        await ask_samples(decode, PARTS, long)


async def test_logprobs_are_those_of_the_model_before_any_temperature(world: World) -> None:
    decode = await world.decode()
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=6, ignore_eos=True, num_top_logprobs=4)
    answers = await ask_samples(decode, PARTS, params)
    ids, told = answers.token_ids[0], answers.logprobs[0]
    assert len(told) == len(ids) == 6
    oracle = world.oracle()
    prompt = list(prompt_of(PARTS, ids_of(decode.engine)).token_ids)
    for index, (token_id, said) in enumerate(zip(ids, told, strict=True)):
        context = oracle.exact_context(prompt + ids[:index], [])
        expected = torch.log_softmax(oracle.decoding.logits_after([context])[0], -1)
        context.close()
        assert said.logprob == pytest.approx(float(expected[token_id]), abs=2e-4)
        values, likeliest = torch.topk(expected, 4)
        assert [top.token_id for top in said.top] == likeliest.tolist()
        assert [top.logprob for top in said.top] == pytest.approx(values.tolist(), abs=2e-4)
    assert not (await ask_samples(decode, PARTS, DRAWN)).logprobs[0]


def as_dict(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
