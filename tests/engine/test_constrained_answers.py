"""Whatever the model's weights say, an answer matches its constraint; and it is drawn from what the model leaves."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from constraint_worlds import (
    DEMO,
    EOS,
    PERSON,
    VOCAB_SIZE,
    answers,
    check_person,
    demo_tokenizer,
    drawn_alone,
    is_json_object,
    prompt_of,
    random_engine,
)
from engine_worlds import engine_of, tokens

from spolia_core.constraint import Constraint
from spolia_core.errors import InternalError, InvalidRequest, NotSupported
from spolia_core.prompt import Prompt
from spolia_core.reuse import FinishReason
from spolia_core.sampling import SamplingParams
from spolia_core.tool_calls import parse_tool_calls
from spolia_core.tools import read_tool_choice
from spolia_engine.engine import Engine
from spolia_engine.generation import Generation
from spolia_engine.next_tokens import draw

pytestmark = pytest.mark.usefixtures("place")

SCHEMA = Constraint.json_schema(PERSON)
CITY = re.compile(r"[A-Z][a-z]{2,8} [0-9]{4}")


def generation_of(constraint: Constraint, sample_index: int = 0, **params: Any) -> Generation:
    sampling = SamplingParams(**{"max_tokens": 400, **params, "constraint": constraint})
    core = random_engine()
    return core.generation(sampling, sample_index, core.compile_constraint(sampling))


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"temperature": 3.0}, {"top_p": 0.5}, {"top_k": 3}])
def test_a_random_model_keeps_a_schema(sampling: dict[str, Any]) -> None:
    found = answers(SCHEMA, 4, **sampling)
    for answer in found:
        assert answer.finish_reason is FinishReason.EOS
        check_person(json.loads(answer.text))
    if sampling.get("temperature") != 0.0:
        assert len({answer.text for answer in found}) == 4


def test_random_logits_keep_every_kind() -> None:
    lark = Constraint.lark('start: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/')
    tools = [{"type": "function", "function": {"name": "f", "parameters": {**PERSON}}}]
    calls = read_tool_choice(tools, "required", parallel=False).constraint
    assert calls is not None
    for seed in range(8):
        drawn = [
            drawn_alone(generation_of(each, temperature=1.0, seed=seed), seed)
            for each in (
                Constraint.regex(CITY.pattern),
                Constraint.one_of(["yes", "no", "perhaps"]),
                lark,
                SCHEMA,
                calls,
            )
        ]
        city, choice, total, person, call = (each.text for each in drawn)
        assert CITY.fullmatch(city)
        assert choice in ("yes", "no", "perhaps")
        assert drawn[2].finish_reason is not FinishReason.STOP
        assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*", total.rstrip("+")), total
        check_person(json.loads(person))
        (only,) = parse_tool_calls(call).calls
        check_person(json.loads(only.arguments))


def test_any_object_is_an_object_unless_it_is_cut() -> None:
    ended = 0
    for seed in range(12):
        drawn = drawn_alone(generation_of(Constraint.json_object(), temperature=1.0, seed=seed), seed)
        if drawn.finish_reason is FinishReason.EOS:
            ended += 1
            assert is_json_object(drawn.text)
        else:
            assert drawn.finish_reason is FinishReason.LENGTH
            assert len(drawn.token_ids) == 400
    assert ended > 0


def test_the_real_model_answers_under_a_constraint() -> None:
    engine = Engine.load(DEMO, pool_bytes=1 << 26)
    prompt = prompt_of(
        "The captain of the Bulette is Judith Thorne.\nQuestion: Who is the captain of the Bulette?\nAnswer:"
    )
    free = engine.generate(prompt, SamplingParams(max_tokens=12, stop=("\n",)))
    # What the model would say anyway it says under a constraint that allows it, token for token.
    anything = SamplingParams(max_tokens=12, stop=("\n",), constraint=Constraint.regex(r"(.|\n)*"))
    assert engine.generate(prompt, anything).token_ids == free.token_ids
    assert "Judith" in free.text
    names = Constraint.one_of([" Ursel Crane", " Judith Thorne", " Greta Winter"])
    assert engine.generate(prompt, SamplingParams(constraint=names)).text == " Judith Thorne"
    person = engine.generate(prompt, SamplingParams(max_tokens=200, constraint=SCHEMA))
    check_person(json.loads(person.text))


def test_the_end_is_drawn_only_where_the_constraint_allows_it() -> None:
    to_the_end = torch.zeros(VOCAB_SIZE)
    to_the_end[EOS] = 1e4
    generation = generation_of(Constraint.regex("[a-z]{5,9}"))
    while generation.finish_reason is None:
        draw(generation, to_the_end)
    assert generation.finish_reason is FinishReason.EOS
    assert generation.token_ids[-1] == EOS
    assert 5 <= len(generation.text) <= 9
    whole = generation_of(Constraint.one_of(["yes"]))
    while whole.finish_reason is None:
        draw(whole, to_the_end)
    assert whole.text == "yes"
    assert EOS not in whole.token_ids, "nothing else could follow, so no step was spent on it"


def test_max_tokens_cuts_an_answer_and_says_so() -> None:
    (answer,) = answers(SCHEMA, max_tokens=5)
    assert answer.finish_reason is FinishReason.LENGTH
    assert len(answer.token_ids) == 5
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)
    whole = len(answers(SCHEMA)[0].token_ids)
    assert answers(SCHEMA, max_tokens=whole)[0].finish_reason is FinishReason.EOS, "whole with its last token"


def test_a_stop_string_ends_an_answer_before_its_constraint_does() -> None:
    (whole,) = answers(SCHEMA)
    (answer,) = answers(SCHEMA, stop=('"age"',))
    assert answer.finish_reason is FinishReason.STOP
    assert answer.text == whole.text.split('"age"')[0]


def test_draws_follow_the_models_distribution_among_what_is_allowed() -> None:
    constraint = Constraint.one_of(["red", "blue", "green"])
    scores = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 2
    matcher = generation_of(constraint).matcher
    assert matcher is not None
    allowed = torch.from_numpy(matcher.allowed())
    assert len(allowed) > 4
    for params, power in (({"temperature": 1.0}, 1.0), ({"temperature": 2.0}, 0.5)):
        expected = torch.softmax(scores[allowed].double() * power, -1)
        num = 3000
        drawn = Counter(
            draw(generation_of(constraint, index, seed=11, **params), scores).token_ids[0] for index in range(num)
        )
        assert set(drawn) <= set(allowed.tolist())
        for token_id, probability in zip(allowed.tolist(), expected.tolist(), strict=True):
            error = math.sqrt(probability * (1 - probability) / num)
            assert drawn[token_id] / num == pytest.approx(probability, abs=4.5 * error + 1e-9)
    # top_p counts the mass of what is allowed: the likeliest alone where it reaches it.
    best = float(torch.softmax(scores[allowed].double(), -1).max())
    narrow = {"temperature": 1.0, "top_p": best * 0.99}
    ids = {draw(generation_of(constraint, index, **narrow), scores).token_ids[0] for index in range(50)}
    assert ids == {int(allowed[scores[allowed].argmax()])}


def test_logprobs_are_of_the_distribution_that_is_drawn_from() -> None:
    scores = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    generation = generation_of(Constraint.one_of(["red", "blue"]), num_top_logprobs=20, temperature=0.7)
    matcher = generation.matcher
    assert matcher is not None
    allowed = matcher.allowed().tolist()
    (told,) = draw(generation, scores).logprobs
    assert sorted(token_id for token_id, _ in told.top) == allowed, "nothing else is told, though 20 were asked for"
    assert sum(math.exp(p) for _, p in told.top) == pytest.approx(1.0)
    expected = torch.log_softmax(scores[allowed], -1)
    assert dict(told.top) == pytest.approx(dict(zip(allowed, expected.tolist(), strict=True)))
    assert told.logprob == pytest.approx(dict(told.top)[generation.token_ids[0]])


def test_an_answer_goes_on_from_the_tokens_another_node_drew() -> None:
    whole = drawn_alone(generation_of(SCHEMA, temperature=1.0, seed=2), 2)
    for stood in range(0, len(whole.token_ids), 7):
        again = generation_of(SCHEMA, temperature=1.0, seed=2)
        assert again.resume(whole.token_ids[:stood], 0) is None
        generator = torch.Generator().manual_seed(2)
        for _ in range(stood):
            torch.randn(VOCAB_SIZE, generator=generator)
        while again.finish_reason is None:
            draw(again, torch.randn(VOCAB_SIZE, generator=generator) * 3)
        assert again.token_ids == whole.token_ids
        assert again.text == whole.text
    ended = generation_of(SCHEMA).resume(whole.token_ids, len(whole.text))
    assert ended is not None
    assert ended.text == ""


def test_tokens_that_break_the_constraint_are_no_answer_to_resume() -> None:
    ids = demo_tokenizer().encode('{"name": 7', add_special_tokens=False).ids
    with pytest.raises(InvalidRequest, match="breaks the request's constraint at token") as caught:
        generation_of(SCHEMA).resume(ids, 0)
    assert caught.value.field == "resume.token_ids"
    with pytest.raises(InternalError, match="forbids it"):
        generation_of(SCHEMA).accept(ids[-1])


def test_an_answer_that_branches_follows_its_constraint_on_both_sides() -> None:
    trunk = generation_of(SCHEMA, temperature=1.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        draw(trunk, torch.randn(VOCAB_SIZE, generator=generator))
    branch = trunk.branch(1)
    for index, each in enumerate((branch, trunk)):
        check_person(json.loads(drawn_alone(each, 10 + index).text))
    assert branch.text != trunk.text


def test_an_engine_without_a_tokenizer_refuses_constraints() -> None:
    with pytest.raises(NotSupported, match="without its model's tokenizer"):
        engine_of().generate(Prompt.live(tokens(3)), SamplingParams(constraint=Constraint.json_object()))


def test_the_engine_refuses_a_bad_constraint_before_it_holds_memory() -> None:
    engine = random_engine()
    with pytest.raises(NotSupported, match="uniqueItems"):
        engine.generate(
            prompt_of("Hi"), SamplingParams(constraint=Constraint.json_schema({"uniqueItems": True, "type": "array"}))
        )
    assert engine.pool.available_blocks == engine.pool.num_blocks
