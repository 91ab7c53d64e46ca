"""What the doctor concludes, from figures made up for it."""

from __future__ import annotations

import itertools
import random

import pytest

from spolia.answers import cluster_of
from spolia.doctor.cluster_checks import _stores
from spolia.doctor.finding import State
from spolia.doctor.isolation import Round, Verdict, finding_of
from spolia.doctor.signed_rank import MIN_PAIRS, signed_rank
from spolia.v1.common_pb2 import TIER_DISK, TIER_RAM
from spolia.v1.directory_pb2 import NODE_ROLE_KVSTORE, NodeLoad, NodeRecord
from spolia.v1.gateway_pb2 import GetClusterResponse
from spolia.v1.kvstore_pb2 import TierStats
from spolia_core.reuse import ReuseMode

NOISE_MS = 4.0
HIT_MS = 30.0


def test_what_stores_hold_is_told_by_tier_and_a_failing_tier_fails() -> None:
    def store(node_id: str, *, healthy: bool) -> NodeRecord:
        tiers = [
            TierStats(tier=TIER_RAM, num_objects=17, used_bytes=6 << 20, healthy=True),
            TierStats(tier=TIER_DISK, num_objects=20, used_bytes=7 << 20, healthy=healthy),
        ]
        return NodeRecord(node_id=node_id, role=NODE_ROLE_KVSTORE, load=NodeLoad(tiers=tiers))

    def told(*nodes: NodeRecord) -> tuple[State, str]:
        finding = _stores(cluster_of(GetClusterResponse(nodes=nodes, directory_reachable=True)))
        return finding.state, finding.said

    well = store("a", healthy=True)
    assert told(well, store("b", healthy=True)) == (State.OK, "RAM: 34 chunks, 12.0 MiB, disk: 40 chunks, 14.0 MiB")
    assert told(well, store("b", healthy=False))[0] is State.FAILED
    assert told(well, store("b", healthy=False))[1].startswith("b's disk takes no chunks now; RAM: 34 chunks")
    assert told()[0] is State.SKIPPED


def enumerated(differences: list[float]) -> float:
    """The two-sided probability by its definition: every choice of signs, for differences without ties."""
    by_size = sorted(differences, key=abs)
    ranks = range(1, len(by_size) + 1)
    observed = sum(rank for rank, difference in zip(ranks, by_size, strict=True) if difference > 0)
    extreme = min(observed, sum(ranks) - observed)
    flips = list(itertools.product((0, 1), repeat=len(ranks)))
    as_far = sum(sum(rank * up for rank, up in zip(ranks, flip, strict=True)) <= extreme for flip in flips)
    return min(1.0, 2 * as_far / len(flips))


@pytest.mark.parametrize("seed", range(6))
def test_the_probability_is_that_of_all_sign_flips(seed: int) -> None:
    source = random.Random(seed)
    differences = [source.gauss(0.4 * seed, 1.0) for _ in range(10)]
    assert signed_rank(differences).p_value == pytest.approx(enumerated(differences))


def test_the_interval_holds_zero_when_the_test_says_so_and_not_otherwise() -> None:
    source = random.Random(1)
    for _ in range(300):
        result = signed_rank([source.gauss(source.choice((0.0, 1.0)), 1.0) for _ in range(12)])
        assert result.is_beyond_noise == (result.p_value <= 0.01)
        assert result.low <= result.shift <= result.high


def test_the_interval_misses_the_truth_about_as_seldom_as_it_says() -> None:
    source = random.Random(2)
    trials = [[source.expovariate(1) - source.expovariate(1) for _ in range(16)] for _ in range(1000)]
    missed = sum(signed_rank(differences).is_beyond_noise for differences in trials)
    assert missed <= 22  # at most 1 in 100; 22 of 1000 is four deviations above


def test_one_stalled_request_changes_little() -> None:
    source = random.Random(3)
    differences = [source.gauss(0.0, 1.0) for _ in range(16)]
    assert not signed_rank([*differences[:-1], 10_000.0]).is_beyond_noise


def test_too_few_pairs_prove_nothing_and_are_not_taken() -> None:
    with pytest.raises(ValueError, match="at least 8"):
        signed_rank([1.0] * (MIN_PAIRS - 1))
    assert signed_rank([1.0] * MIN_PAIRS).p_value <= 0.01


def verdict(
    *, leak_ms: float = 0.0, hit_ms: float = HIT_MS, num_leaked: int = 0, noise_ms: float = NOISE_MS, seed: int = 0
) -> Verdict:
    source = random.Random(seed)

    def noisy(ms: float) -> float:
        return ms + source.gauss(0.0, noise_ms)

    rounds = tuple(Round(noisy(100 - leak_ms), noisy(100), noisy(100 - hit_ms), num_leaked, 0, 480) for _ in range(16))
    return Verdict(
        rounds,
        signed_rank([r.known_ms - r.fresh_ms for r in rounds]),
        signed_rank([r.fresh_ms - r.hit_ms for r in rounds]),
    )


@pytest.mark.parametrize(
    ("seen", "state", "words"),
    [
        (verdict(), State.OK, "no difference beyond noise"),
        (verdict(num_leaked=1), State.FAILED, "reused 16 tokens"),
        (verdict(leak_ms=HIT_MS), State.FAILED, "times tell"),
        (verdict(leak_ms=HIT_MS / 3), State.FAILED, "times tell"),
        (verdict(leak_ms=-HIT_MS), State.FAILED, "times tell"),  # slower tells as much as faster
        (verdict(hit_ms=0.0), State.WARNING, "prove nothing"),
        (verdict(noise_ms=35.0, hit_ms=60.0), State.WARNING, "too noisy"),
    ],
)
def test_a_verdict_is_told_as_what_it_is(seen: Verdict, state: State, words: str) -> None:
    finding = finding_of(ReuseMode.LINKED, seen)
    assert (finding.state, words in finding.said) == (state, True), finding
    assert finding.facts["num_rounds"] == 16
