"""The order of slices: shares of tenants, and how long a job may wait. Played through with time as a number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_worker.job_order import AGING_TOKENS_PER_S, ReadyJob, ServedTokens, choose

SLICE = 256
TOKENS_PER_S = 1000.0
BUSY = 100_000
"""Tokens of a job that keeps its tenant busy through any of these plays."""

PLAYS = settings(deadline=None, max_examples=40, derandomize=True, database=None)


@dataclass
class Job:
    tenant_id: str
    num_tokens: int
    submitted_at: float
    endless: bool = False
    """Whether the like of it comes as soon as it ends."""
    tokens_left: int = 0
    since: float = 0.0

    def __post_init__(self) -> None:
        self.tokens_left, self.since = self.num_tokens, self.submitted_at


@dataclass(frozen=True)
class Slice:
    """What ran, and how everything stood when it was chosen."""

    began_at: float
    job: int
    num_tokens: int
    left: dict[int, int]
    """Tokens left of each job that was ready."""
    since: dict[int, float]


def play(jobs: list[Job], num_slices: int = 10_000) -> list[Slice]:
    """Runs jobs as an engine's thread would. Each slice takes its tokens' time."""
    served, now, slices = ServedTokens(), 0.0, []
    while len(slices) < num_slices:
        ready = [i for i, job in enumerate(jobs) if job.submitted_at <= now and job.tokens_left]
        served.activate({jobs[i].tenant_id for i in ready})
        if not ready:
            now = min((job.submitted_at for job in jobs if job.tokens_left), default=-1.0)
            if now < 0:
                break
            continue
        views = [
            ReadyJob(
                jobs[i].tenant_id, jobs[i].tokens_left, now - jobs[i].since, jobs[i].tokens_left < jobs[i].num_tokens
            )
            for i in ready
        ]
        chosen = ready[choose(views, served)]
        job = jobs[chosen]
        num_tokens = min(SLICE, job.tokens_left)
        slices.append(
            Slice(now, chosen, num_tokens, {i: jobs[i].tokens_left for i in ready}, {i: jobs[i].since for i in ready})
        )
        job.tokens_left -= num_tokens
        served.serve(job.tenant_id, num_tokens)
        now += num_tokens / TOKENS_PER_S
        job.since = now
        if job.endless and not job.tokens_left:
            job.tokens_left = job.num_tokens
    return slices


def arrivals(tenants: str) -> st.SearchStrategy[list[Job]]:
    return st.lists(
        st.builds(
            Job,
            tenant_id=st.sampled_from(tenants),
            num_tokens=st.one_of(st.integers(1, 300), st.integers(1, 6000)),
            submitted_at=st.integers(0, 8000).map(lambda ms: ms / 1000),
        ),
        min_size=1,
        max_size=20,
    )


def test_what_a_tenant_used_while_it_was_alone_is_not_held_against_it() -> None:
    """Its jobs were of one slice, with nobody ready between them."""
    served = ServedTokens()
    for _ in range(1000):
        served.activate({"early"})
        served.serve("early", 100)
        served.activate(set())
    served.activate({"early", "late"})
    jobs = [ReadyJob("early", 100, 0.0), ReadyJob("late", BUSY, 0.0)]
    order = []
    for _ in range(3):
        number = choose(jobs, served)
        served.serve(jobs[number].tenant_id, SLICE)
        order.append(number)
    assert set(order[:2]) == {0, 1}
    assert served.num_tenants == 2


@PLAYS
@given(arrivals("ab"), st.integers(0, 5000))
def test_tenants_with_work_all_the_time_get_equal_shares_whatever_came_before(others: list[Job], ms: int) -> None:
    """From the moment that both have work to its end, over every stretch of time."""
    began = ms / 1000
    slices = play([*others, Job("x", BUSY, 0.0), Job("y", BUSY, began)], 200)
    tenants = [job.tenant_id for job in others] + ["x", "y"]
    lead, leads = 0, [0]
    for one in slices:
        if one.began_at >= began and tenants[one.job] in "xy":
            lead += one.num_tokens if tenants[one.job] == "x" else -one.num_tokens
            leads.append(lead)
    assert max(leads) - min(leads) <= 2 * SLICE


@PLAYS
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=12), st.integers(2, 5))
def test_a_tenant_with_many_jobs_takes_nothing_from_one_with_few(sizes: list[int], num_tenants: int) -> None:
    flood = [Job("flood", BUSY, 0.0) for _ in range(10)]
    quiet = [Job(f"quiet {i}", size, 0.0) for i in range(num_tenants) for size in sizes]
    jobs = flood + quiet
    got: Counter[str] = Counter()
    for one in play(jobs, 150):
        got[jobs[one.job].tenant_id] += one.num_tokens
        if any(jobs[i].tenant_id.startswith("quiet") for i in one.left):
            active = {jobs[i].tenant_id for i in one.left}
            assert got["flood"] <= min(got[tenant] for tenant in active) + 2 * SLICE


@PLAYS
@given(st.integers(0, 100), st.integers(1, 20))
def test_idling_earns_no_credit(num_before: int, num_tenants: int) -> None:
    """Who comes late has its share from then on, and nothing for the time before."""
    jobs = [Job(f"early {i}", BUSY, 0.0) for i in range(num_tenants)]
    late = num_before * SLICE / TOKENS_PER_S
    jobs.append(Job("late", BUSY, late))
    slices = [one for one in play(jobs, num_before + 10 * num_tenants + 20) if one.began_at >= late]
    mine = [number for number, one in enumerate(slices) if one.job == num_tenants]
    assert mine
    assert mine[0] <= num_tenants
    assert all(after - before >= num_tenants for before, after in pairwise(mine))


@PLAYS
@given(arrivals("a"))
def test_a_job_waits_for_at_most_one_slice_of_each_longer_one(jobs: list[Job]) -> None:
    slices = play(jobs)
    for me in range(len(jobs)):
        longer: Counter[int] = Counter()
        since = None
        for one in slices:
            if me not in one.left:
                continue
            if one.since[me] != since:
                longer.clear()
                since = one.since[me]
            if one.job != me and one.left[one.job] > one.left[me]:
                longer[one.job] += 1
                assert longer[one.job] <= 1


@PLAYS
@given(arrivals("a"))
def test_a_job_that_waited_long_lets_every_other_pass_at_most_once(jobs: list[Job]) -> None:
    slices = play(jobs)
    for me in range(len(jobs)):
        passed: Counter[int] = Counter()
        since = None
        for one in slices:
            if me not in one.left:
                continue
            if one.since[me] != since:
                passed.clear()
                since = one.since[me]
            if one.job != me and one.began_at >= one.since[me] + one.left[me] / AGING_TOKENS_PER_S:
                passed[one.job] += 1
                assert passed[one.job] <= 1


@PLAYS
@given(st.integers(1, 8000), st.integers(1, SLICE), st.integers(1, 5))
def test_short_jobs_without_end_do_not_starve_a_long_one(num_long: int, num_short: int, num_others: int) -> None:
    """There are always so many short ones of the same tenant: as one ends, the next is there."""
    jobs = [Job("a", num_long, 0.0), *(Job("a", num_short, 0.0, endless=True) for _ in range(num_others))]
    since = 0.0
    for one in play(jobs, 500):
        if one.job == 0:
            others_s = (num_others + 1) * SLICE / TOKENS_PER_S
            assert one.began_at - since <= one.left[0] / AGING_TOKENS_PER_S + others_s
            since = one.began_at + one.num_tokens / TOKENS_PER_S


def test_a_short_job_runs_right_after_the_slice_under_way() -> None:
    jobs = [Job("a", 10_000, 0.0), Job("a", 50, 5.0)]
    slices = play(jobs)
    place = next(number for number, one in enumerate(slices) if one.job == 1)
    assert slices[place].began_at - 5.0 < SLICE / TOKENS_PER_S
    assert sum(one.num_tokens for one in slices[:place]) < 10_000


@PLAYS
@given(arrivals("abc"))
def test_the_same_arrivals_give_the_same_order_and_all_of_them_end(jobs: list[Job]) -> None:
    copies = [Job(job.tenant_id, job.num_tokens, job.submitted_at) for job in jobs]
    assert play(jobs) == play(copies)
    assert all(job.tokens_left == 0 for job in jobs)


def test_work_under_way_goes_before_equal_work_that_holds_nothing_yet() -> None:
    served = ServedTokens()
    jobs = [ReadyJob("a", 100, 0.0), ReadyJob("b", 100, 0.0), ReadyJob("a", 100, 0.0, begun=True)]
    assert choose(jobs, served) == 2
    assert choose(jobs[:2], served) == 0


@PLAYS
@given(st.lists(st.tuples(st.sets(st.integers(0, 50), max_size=6), st.integers(0, 500)), max_size=200))
def test_counters_only_grow_and_tenants_that_are_gone_are_forgotten(moves: list[tuple[set[int], int]]) -> None:
    served = ServedTokens()
    before = dict.fromkeys(map(str, range(51)), 0)
    for tenants, num_tokens in moves:
        served.activate({str(tenant) for tenant in tenants})
        for tenant in tenants:
            served.serve(str(tenant), num_tokens)
        now = {tenant: served[tenant] for tenant in before}
        assert all(now[tenant] >= before[tenant] for tenant in before)
        before = now
    for _ in range(60):  # one tenant alone, until it has caught up with all that were
        served.activate({"alone"})
        served.serve("alone", max(before.values()) + 1)
    served.activate({"alone"})
    assert served.num_tenants == 1
