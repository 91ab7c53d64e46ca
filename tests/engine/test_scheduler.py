"""The scheduler against its rules, and whole lives of requests in a slow simulation with a ledger of blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_engine.scheduler import Plan, Running, State, Waiting, plan


def waiting(number: int, num_blocks: int, *, has_place: bool = False, places: int = 1) -> Waiting:
    return Waiting(number, num_blocks, has_place, places)


def running(number: int, *, new: int = 0, own: int = 1, cost: int = 1) -> Running:
    return Running(number, new, own, cost)


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan(State(10, token_budget=256)) == Plan((), (), (), 256)


def test_decoding_comes_before_admission_and_before_slices() -> None:
    state = State(
        3, free_places=8, token_budget=10, waiting=[waiting(5, 2)], running=[running(0, new=1), running(1, new=1)]
    )
    assert plan(state) == Plan((), (0, 1), (), 8)


def test_the_cheapest_goes_first_and_of_equals_the_latest_but_never_the_oldest() -> None:
    batch = [running(0, new=1, cost=1), running(1, new=1, cost=9), running(2, new=1, cost=5), running(3, cost=5)]
    assert plan(State(0, running=batch)).preempt == (3, 2)
    assert plan(State(2, running=batch)).preempt == (3,)
    assert plan(State(3, running=batch)).preempt == ()


def test_who_has_nothing_to_give_is_not_preempted() -> None:
    found = plan(State(0, running=[running(0, new=1, own=3), running(1, own=0, cost=0)]))
    assert found == Plan((), (1,), (), 0)


def test_nobody_is_admitted_while_somebody_is_preempted() -> None:
    batch = [running(0, new=1), running(1, own=50)]
    assert plan(State(0, free_places=4, waiting=[waiting(2, 1)], running=batch)) == Plan((1,), (0,), (), 0)


def test_none_passes_one_that_waits_for_blocks_but_the_preempted_need_no_place() -> None:
    queue = [waiting(1, 2, has_place=True), waiting(2, 1), waiting(3, 1)]
    assert plan(State(9, num_holding=1, free_places=1, waiting=queue)).admit == (1, 2)
    assert plan(State(9, num_holding=1, free_places=0, waiting=queue)).admit == (1,)
    assert plan(State(1, num_holding=1, free_places=5, waiting=queue)).admit == ()
    assert plan(State(4, promised_blocks=2, num_holding=1, free_places=5, waiting=queue)).admit == (1,)


def test_the_first_is_admitted_where_nobody_could_make_room_for_it() -> None:
    assert plan(State(0, free_places=2, waiting=[waiting(4, 9), waiting(5, 1)])).admit == (4,)


def test_every_sequence_takes_a_place_and_none_passes_one_that_waits_for_several() -> None:
    queue = [waiting(1, 1, places=4), waiting(2, 1), waiting(3, 1, has_place=True)]
    assert plan(State(9, num_holding=1, free_places=3, waiting=queue)).admit == (3,)
    assert plan(State(9, num_holding=1, free_places=5, waiting=queue)).admit == (1, 2, 3)


def test_one_that_takes_more_places_than_there_are_runs_when_nobody_else_has_one() -> None:
    large, small = waiting(1, 1, places=9), waiting(2, 1)
    assert plan(State(9, free_places=4, waiting=[large, small])).admit == (1,)
    assert plan(State(9, free_places=4, num_holding=1, waiting=[large, small])).admit == ()
    assert plan(State(9, free_places=3, waiting=[waiting(0, 99, has_place=True), large])).admit == (0,)


STATES = st.builds(
    lambda available, promised, holding, places, budget, queue, batch: State(
        available,
        promised,
        holding,
        places,
        budget,
        [Waiting(i, *w) for i, w in enumerate(queue, start=100)],
        [Running(i, *d) for i, d in enumerate(batch)],
    ),
    st.integers(0, 20),
    st.integers(0, 10),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 64),
    st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(1, 3)), max_size=5),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 40)), max_size=6),
)


@given(STATES)
@settings(max_examples=400, deadline=None)
def test_a_plan_keeps_within_what_there_is(state: State) -> None:
    found, batch = plan(state), {d.number: d for d in state.running}
    assert not set(found.preempt) & set(found.decode)
    assert set(found.preempt) | set(found.decode) <= batch.keys()
    freed = sum(batch[n].num_own_blocks for n in found.preempt)
    taken = sum(batch[n].num_new_blocks for n in found.decode)
    assert taken <= state.available_blocks + freed
    if batch:
        assert min(batch) not in found.preempt
    queue = {w.number: w for w in state.waiting}
    assert list(found.admit) == sorted(found.admit)
    placed = [queue[n].num_places for n in found.admit if not queue[n].has_place]
    has_places_taken = state.num_holding or state.running or any(w.has_place for w in state.waiting)
    assert sum(placed) <= state.free_places or (len(placed) == 1 and not has_places_taken)
    needed = sum(queue[n].num_blocks for n in found.admit)
    if state.num_holding or state.running:
        assert not found.admit or needed + taken + state.promised_blocks <= state.available_blocks + freed
    assert plan(state) == found, "a replay finds the same"


@dataclass(slots=True)
class Life:
    """A request in the simulation: what it takes, and how far it is."""

    number: int
    context_blocks: int
    answer_tokens: int
    num_places: int = 1
    done: int = 0
    held: int = 0
    admitted: bool = False

    @property
    def tail_blocks(self) -> int:
        return -(-(self.done + 1) // BLOCK)


BLOCK = 4
POOL = 24


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_every_request_ends_and_the_ledger_adds_up(
    sizes: list[tuple[int, int, int]], max_running: int, data: st.DataObject
) -> None:
    """One step at a time, cancels in between; a request holds its context and a tail that grows by the token."""
    lives = [Life(number, *size) for number, size in enumerate(sizes)]
    ended: Counter[str] = Counter()
    present = list(lives)
    for _ in range(3000):
        if not present:
            break
        if data.draw(st.integers(0, 19)) == 0:
            present.remove(data.draw(st.sampled_from(present)))
            ended["cancelled"] += 1
            continue
        free = POOL - sum(life.held for life in present)
        assert free >= 0
        running = [life for life in present if life.held]
        state = State(
            available_blocks=free,
            free_places=max_running - sum(life.num_places for life in present if life.admitted),
            waiting=[
                Waiting(x.number, x.context_blocks + x.tail_blocks, x.admitted, x.num_places)
                for x in present
                if not x.held
            ],
            running=[
                Running(x.number, max(0, x.context_blocks + x.tail_blocks - x.held), x.held, x.context_blocks)
                for x in running
            ],
        )
        found = plan(state)
        assert found.preempt or found.decode or found.admit, "nobody could go on"
        by_number = {life.number: life for life in present}
        for number in found.preempt:
            by_number[number].held = 0
        for number in found.decode:
            life = by_number[number]
            life.held, life.done = life.context_blocks + life.tail_blocks, life.done + 1
            if life.done == life.answer_tokens:
                present.remove(life)
                ended["answered"] += 1
        for number in found.admit:
            life = by_number[number]
            life.admitted = True
            # What it had said stands in its context when it is resumed.
            life.held = min(POOL, life.context_blocks + life.tail_blocks)
    assert not present, "somebody waits for ever"
    assert sum(ended.values()) == len(lives)
