"""A steady crowd, of answers that take what the test says. Time jumps: an answer takes that, and not a moment more."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import pytest
from jumping_clock import run_jumping

from spolia_bench.gateway import steady
from spolia_bench.gateway.questions import Asked
from spolia_bench.gateway.steady import Ask, steadily
from spolia_bench.gateway.timing import StreamTime, WrongAnswer

ANSWER_S = 0.1


def now_s() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady, "time", SimpleNamespace(perf_counter=now_s))


def crowd(ask: Ask, asked: list[Asked], num_streams: int, spread_s: float) -> list[StreamTime]:
    return run_jumping(steadily(ask, asked, num_streams, spread_s))


class Answering:
    """A way whose answers all take `ANSWER_S`."""

    def __init__(self) -> None:
        self.took: list[StreamTime] = []
        self.num_running = self.most = 0

    async def __call__(self, asked: Asked) -> StreamTime:
        sent_s = now_s()
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        await asyncio.sleep(ANSWER_S)
        self.num_running -= 1
        self.took.append(StreamTime(sent_s, sent_s + ANSWER_S / 2, now_s(), asked.num_tokens, 1.0, 2.0))
        return self.took[-1]


def questions(count: int) -> list[Asked]:
    return [Asked(str(index), "", (1,), 3) for index in range(count)]


def test_as_many_ask_at_once_as_there_are_streams_and_every_question_is_asked_once() -> None:
    way = Answering()
    counted = crowd(way, questions(20), 4, ANSWER_S)
    assert way.most == 4
    assert len(way.took) == 20
    assert len(set(map(id, counted))) == len(counted)


def test_only_answers_with_all_others_beside_them_count() -> None:
    way = Answering()
    counted = crowd(way, questions(20), 4, ANSWER_S)
    began = sorted(took.sent_s for took in way.took)
    assert 8 <= len(counted) <= 14, "neither the first of those who came first nor the last of anyone"
    for took in counted:
        others = [o for o in way.took if o is not took]
        for moment in (took.sent_s, took.end_s):
            at_it = sum(o.sent_s <= moment + 0.01 and o.end_s >= moment - 0.01 for o in others)
            assert at_it >= 3, (moment - began[0], [(o.sent_s - began[0], o.end_s - began[0]) for o in way.took])


def test_streams_stay_apart_as_they_began() -> None:
    way = Answering()
    counted = crowd(way, questions(24), 4, ANSWER_S)
    sent = sorted(took.sent_s for took in counted)
    gaps = [after - before for before, after in pairwise(sent)]
    assert max(gaps) < ANSWER_S, "no burst, and no pause"


def test_answers_that_are_far_shorter_than_expected_have_company_too() -> None:
    """The spread is what answers took before: on a busy machine perhaps."""
    way = Answering()
    counted = crowd(way, questions(16), 4, 10 * ANSWER_S)
    assert way.most == 4
    assert len(counted) >= 4


def test_where_nobody_had_full_company_that_is_an_error() -> None:
    with pytest.raises(WrongAnswer, match="none had 3 others"):
        crowd(Answering(), questions(4), 4, 10 * ANSWER_S)


def test_an_answer_of_another_length_is_an_error() -> None:
    async def short(asked: Asked) -> StreamTime:
        return StreamTime(0.0, 0.1, 0.2, asked.num_tokens - 1, 1.0, 2.0)

    with pytest.raises(ExceptionGroup) as caught:
        crowd(short, questions(4), 2, 0.0)
    assert caught.group_contains(WrongAnswer)
