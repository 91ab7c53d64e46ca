"""What a decode node does next: who is admitted, who decodes, who gives up memory. Pure: a state in, a plan out.

So a trace of states replays to the same plans, and time never enters: who came first does. Three rules:

- **Decode first.** What the sequences that decode need for their next token is theirs before anyone is admitted.
- **The oldest goes on.** Where blocks do not suffice, sequences are preempted, those first that cost least to compute
  again, never the oldest: so somebody always ends, and then the others do.
- **First come, first admitted**, each when the blocks and places it will take are there. None passes one that came
  before it and waits for either: else long prompts, and many samples, would wait for as long as others come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that holds no blocks. `number` is its order of arrival, which a preempted one keeps.

    `num_places`: one for each of its sequences.
    """

    number: int
    num_blocks: int
    """What its context takes, at most, and the token after it."""
    has_place: bool = False
    """Preempted: it still counts among those that run."""
    num_places: int = 1


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that decodes."""

    number: int
    num_new_blocks: int
    """What its next token needs."""
    num_own_blocks: int
    """What comes free when it is preempted."""
    num_recomputed: int
    """Tokens computed again when it is resumed."""


@dataclass(frozen=True, slots=True)
class State:
    """What there is to decide on.

    `promised_blocks` are those of requests admitted that do not decode yet; `num_holding` requests hold blocks, or were
    promised some, besides those of `running`.
    """

    available_blocks: int
    promised_blocks: int = 0
    num_holding: int = 0
    free_places: int = 0
    token_budget: int = 0
    waiting: Sequence[Waiting] = ()
    running: Sequence[Running] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Numbers of requests, in the order in which to act: preempt, decode, admit; and tokens left for prefill slices."""

    preempt: tuple[int, ...]
    decode: tuple[int, ...]
    admit: tuple[int, ...]
    slice_tokens: int


def plan(state: State) -> Plan:
    """The next step. An empty plan means "wait": for blocks that others hold, or for requests."""
    preempt, decode, left_blocks = _grow(state)
    admit = () if preempt else _admit(state, left_blocks - state.promised_blocks)
    return Plan(preempt, decode, admit, max(0, state.token_budget - len(decode)))


def _grow(state: State) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Who is preempted, who decodes, and how many blocks are left behind their next tokens."""
    left = sorted(state.running, key=lambda d: d.number)
    available, preempted = state.available_blocks, []
    while sum(d.num_new_blocks for d in left) > available:
        candidates = [d for d in left[1:] if d.num_own_blocks]
        if not candidates:
            break
        victim = min(candidates, key=lambda d: (d.num_recomputed, -d.number))
        left.remove(victim)
        available += victim.num_own_blocks
        preempted.append(victim.number)
    decode = []
    for d in left:
        if d.num_new_blocks <= available:
            available -= d.num_new_blocks
            decode.append(d.number)
    return tuple(preempted), tuple(decode), available


def _admit(state: State, available: int) -> tuple[int, ...]:
    """Whom blocks and places suffice for. Where nobody runs, the first is admitted: nobody could make room for it."""
    admitted: list[int] = []
    places = state.free_places
    runs = bool(state.running) or state.num_holding > 0
    has_places_taken = runs or any(request.has_place for request in state.waiting)
    for request in sorted(state.waiting, key=lambda w: w.number):
        num_places = 0 if request.has_place else request.num_places
        if num_places > places and (has_places_taken or admitted):
            places = 0  # the preempted may still go on; nobody else passes it
            continue
        if request.num_blocks > available and (runs or admitted):
            break
        available -= request.num_blocks
        places -= num_places
        admitted.append(request.number)
    return tuple(admitted)
