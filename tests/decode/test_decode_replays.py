"""An answer goes on from the tokens that another node drew, and the next turn of a chat from its KV."""

from __future__ import annotations

import pytest
from decode_requests import COMPUTED, DEVICE, HOST, LINKED, LINKED_PROMPTS
from tiny_answers import ask, assert_same, generate_request, resume
from tiny_cluster import World, eventually, tokens

from spolia_core.reuse import ReuseMode, SourceRun
from spolia_core.sampling import SamplingParams

GREEDY = SamplingParams(max_tokens=12)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("no document", ReuseMode.EXACT), ("one", LINKED), ("ends in a document", LINKED), ("is a document", LINKED)],
)
@pytest.mark.parametrize("temperature", [0.0, 1.2])
async def test_a_replay_goes_on_alike_from_every_index(
    world: World, name: str, mode: ReuseMode, temperature: float
) -> None:
    decode = await world.decode()
    parts = LINKED_PROMPTS[name]
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=10)
    expected = world.expect(parts, params, mode)
    whole = await ask(decode, parts, params, mode)
    assert_same(whole, expected)
    for index in range(1, 11):
        answer = await resume(decode, generate_request(decode, parts, params, mode), whole.token_ids[:index])
        assert answer.token_ids == whole.token_ids[index:], index
        assert answer.text == whole.text[index:]
        assert answer.finish is not None
        assert answer.finish.num_generated_tokens == 10


async def test_a_replay_needs_no_more_room_than_the_request_did(world: World) -> None:
    decode = await world.decode(num_blocks=12)
    params = SamplingParams(max_tokens=96)  # 6 blocks, and 6 for the prompt
    whole = await ask(decode, [tokens(96)], params)
    answer = await resume(decode, generate_request(decode, [tokens(96)], params), whole.token_ids[:80])
    assert answer.token_ids == whole.token_ids[80:]


async def test_a_replay_reports_the_prompt_alone(world: World) -> None:
    decode = await world.decode()
    params = SamplingParams(max_tokens=40)
    prompt = [tokens(120)]
    whole = await ask(decode, prompt, params)
    for _ in range(2):  # the second time the first block, which ends in the answer, is here
        answer = await resume(decode, generate_request(decode, prompt, params), whole.token_ids[:20])
        assert answer.token_ids == whole.token_ids[20:]
    assert answer.sources == {DEVICE: 120}


async def test_a_second_turn_reuses_the_first_answer(world: World) -> None:
    store = await world.store()
    first, second = await world.decode(), await world.decode()
    params = SamplingParams(max_tokens=150)
    opening = tokens(120)
    answer = await ask(first, [opening], params)
    # 120 + 149 tokens have KV: two full blocks, the first of which ends in the answer.
    await eventually(lambda: len(store.store.tiers.ram) == 2, "the answer's blocks are published")
    next_turn = [opening + answer.token_ids + tokens(20, 5)]
    expected = world.expect(next_turn, GREEDY)
    here, there = await ask(first, next_turn, GREEDY), await ask(second, next_turn, GREEDY)
    assert_same(here, expected)
    assert_same(there, expected)
    assert here.sources == {DEVICE: 256, COMPUTED: 34}
    assert there.sources == {HOST: 256, COMPUTED: 34}
    assert there.report.runs == [SourceRun(HOST, 256), SourceRun(COMPUTED, 34)]
