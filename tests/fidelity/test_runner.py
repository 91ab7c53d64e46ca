"""Laws of the runner: no loss where nothing is reused inexactly, a loss where something is, and nothing left held."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness_worlds import BOS, case_of, run, tokens, with_questions

from spolia_core.errors import InvalidRequest
from spolia_core.prompt import Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.engine import Engine
from spolia_fidelity import runner as runner_module
from spolia_fidelity.answers import first_line
from spolia_fidelity.case import Case, Question
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.generation import NUM_TRIES, Generated, GenerationGate
from spolia_fidelity.runner import PolicyRun, join, slices
from spolia_fidelity.synthetic import synthetic_cases


def nll_increase(policy: PolicyRun, full: PolicyRun) -> float:
    total = sum(a.nll_sum - b.nll_sum for a, b in zip(policy.outcomes, full.outcomes, strict=True))
    return total / sum(outcome.num_tokens for outcome in full.outcomes)


def mean_kl(policy: PolicyRun) -> float:
    kls = [kl for outcome in policy.outcomes for kl in outcome.kls]
    return sum(kls) / len(kls)


def test_what_is_exact_loses_nothing_and_what_is_not_does(adapter: ModelAdapter, encoder: TextEncoder) -> None:
    cases = [case_of(seed, num_chunks=6) for seed in range(4)]
    runs = run(adapter, encoder, "full,prefix,link:1000,cacheblend:1,naive,sinks:2", cases)
    for name in ("prefix", "link:1000", "cacheblend:1"):
        assert abs(nll_increase(runs[name], runs["full"])) < 1e-5
        assert mean_kl(runs[name]) < 1e-8
        assert all(outcome.num_agreed == outcome.num_tokens for outcome in runs[name].outcomes)
    for name in ("naive", "sinks:2"):  # else the laws above would hold for a harness that measures nothing
        assert mean_kl(runs[name]) > 1e-3
    assert runs["prefix"].reused_tokens > 0


def test_the_reference_is_always_measured(adapter: ModelAdapter, encoder: TextEncoder) -> None:
    assert list(run(adapter, encoder, "naive", [case_of()])) == ["full", "naive"]


def test_a_run_says_the_same_twice_and_whichever_policies_run_beside(
    adapter: ModelAdapter, encoder: TextEncoder
) -> None:
    cases = [case_of(seed) for seed in range(2)]
    first = run(adapter, encoder, "full,naive,link:4", cases)
    again = run(adapter, encoder, "full,naive,link:4", cases)
    alone = run(adapter, encoder, "naive", cases)
    assert all(first[name].outcomes == again[name].outcomes for name in first)
    assert first["naive"].outcomes == alone["naive"].outcomes


def test_exact_match_is_greedy_decoding_giving_the_answer(
    model: str, adapter: ModelAdapter, encoder: TextEncoder
) -> None:
    case = case_of(num_questions=1)
    asked = case.questions[0]
    engine = Engine.of(adapter, encoder.decode, pool_bytes=1 << 24)
    prompt = Prompt.live([*case.preamble_ids, *(t for chunk in case.chunks for t in chunk), *asked.token_ids])
    greedy = engine.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True)).token_ids
    other = (*greedy[:-1], (greedy[-1] + 1) % 256)
    case = with_questions(case, replace(asked, answer_ids=greedy), replace(asked, answer_ids=other))
    right, wrong = run(adapter, encoder, "full", [case])["full"].outcomes
    assert (right.exact, wrong.exact) == (True, False)


def test_scoring_in_slices_changes_nothing(
    adapter: ModelAdapter, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = with_questions(case_of(), *case_of().questions, Question("long", tokens(3, 1), tokens(20, 2), exact=False))
    whole = run(adapter, encoder, "naive", [case])["naive"].outcomes
    monkeypatch.setattr(runner_module, "MAX_SLICE_LOGITS", 7 * adapter.vocab_size)
    sliced = run(adapter, encoder, "naive", [case])["naive"].outcomes
    assert [(o.index, o.exact, o.num_tokens, o.num_agreed) for o in sliced] == [
        (o.index, o.exact, o.num_tokens, o.num_agreed) for o in whole
    ]
    assert [o.nll_sum for o in sliced] == pytest.approx([o.nll_sum for o in whole], abs=1e-5)


def test_slices_hold_every_answer_token_once_and_no_more_than_asked() -> None:
    questions = [Question("t", (1,), tokens(count, count), exact=False) for count in (3, 1, 17, 5)]
    batches = list(slices(questions, 6))
    assert all(sum(piece.end - piece.start for piece in batch) <= 6 for batch in batches)
    covered = [(piece.index, row) for batch in batches for piece in batch for row in range(piece.start, piece.end)]
    assert covered == [(index, row) for index, q in enumerate(questions) for row in range(len(q.answer_ids))]


def test_an_answer_in_pieces_is_exact_only_where_every_piece_is(adapter: ModelAdapter, encoder: TextEncoder) -> None:
    (outcome, *_) = run(adapter, encoder, "full", [case_of()])["full"].outcomes
    right, wrong = replace(outcome, exact=True), replace(outcome, exact=False)
    assert join(0, [right, right]).exact is True
    assert join(0, [right, wrong]).exact is join(0, [wrong, right]).exact is False
    assert join(2, [right, wrong]).num_tokens == 2 * outcome.num_tokens
    assert join(2, [right, wrong]).index == 2


def test_generated_answers_are_what_the_engine_answers(adapter: ModelAdapter, encoder: TextEncoder) -> None:
    case = case_of(num_questions=2)
    engine = Engine.of(adapter, encoder.decode, pool_bytes=1 << 24)
    context = [*case.preamble_ids, *(t for chunk in case.chunks for t in chunk)]
    texts = []
    for question in case.questions:
        params = SamplingParams(max_tokens=len(question.answer_ids) + 8)
        texts.append(first_line(engine.generate(Prompt.live([*context, *question.token_ids]), params).text))
    first, second = (replace(q, exact=False, answers=(text,)) for q, text in zip(case.questions, texts, strict=True))
    other = replace(second, answers=("something else entirely",))
    outcomes = run(adapter, encoder, "full,link:1000", [with_questions(case, first, second, other)])
    for name in ("full", "link:1000"):
        assert [outcome.exact for outcome in outcomes[name].outcomes] == [True, True, False]
        assert [outcome.f1 for outcome in outcomes[name].outcomes][:2] == [1.0, 1.0]


def test_generated_tasks_have_their_answers_decoded_where_that_is_asked_for(encoder: TextEncoder) -> None:
    made = {
        generate: synthetic_cases(
            encoder, seed=0, num_questions=9, num_chunks=2, chunk_tokens=320, generate=generate
        ).cases[0]
        for generate in (False, True)
    }
    info = synthetic_cases(encoder, seed=0, num_questions=40, num_chunks=2, chunk_tokens=320).info
    assert info.num_records == info.num_questions == 40
    for forced, decoded in zip(made[False].questions, made[True].questions, strict=True):
        assert forced.answer_ids == (*decoded.answer_ids, *encoder.eos_ids)
        assert (forced.exact, decoded.exact) == (True, False)
        assert encoder.decode(decoded.answer_ids).strip() in decoded.answers
        assert not forced.answers


def test_a_task_nobody_can_do_is_no_longer_asked_for_answers() -> None:
    question = Question("hard", (1,), (2,), exact=False, answers=("x",))
    case, gate = Case("c", (BOS,), ((1,),), (question,)), GenerationGate()
    for asked in range(NUM_TRIES):
        assert gate.open_questions(case) == [0], asked
        gate.count(case, {0: Generated("y", False, 0.0)})
    assert gate.open_questions(case) == []


def test_one_right_answer_keeps_a_task_open() -> None:
    question = Question("hard", (1,), (2,), exact=False, answers=("x",))
    case, gate = Case("c", (BOS,), ((1,),), (question,)), GenerationGate()
    for right in [True, *[False] * (2 * NUM_TRIES)]:
        gate.count(case, {0: Generated("x", right, 1.0)})
    assert gate.open_questions(case) == [0]


def test_cases_a_model_cannot_take_are_refused_before_any_work(adapter: ModelAdapter, encoder: TextEncoder) -> None:
    bad = with_questions(case_of(), Question("t", (1,), (adapter.vocab_size,), exact=True))
    with pytest.raises(InvalidRequest, match="token id"):
        run(adapter, encoder, "full,naive", [case_of(1), bad])
