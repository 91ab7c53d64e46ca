"""Laws of reuse policies: names, counts, and what a context of each holds."""

from __future__ import annotations

import pytest
from harness_worlds import CHUNK_TOKENS, case_of

from spolia_core.errors import InvalidRequest
from spolia_core.profile import LinkPolicy
from spolia_engine.adapter import ModelAdapter
from spolia_engine.core import EngineCore
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.policy import Linked, parse_policies, parse_policy
from spolia_fidelity.runner import blocks_for

NAMES = ("full", "prefix", "naive", "link:4", "link:1000", "sinks:2", "sinks:2+link:4", "cacheblend:0.25")


def engine_for(adapter: ModelAdapter, encoder: TextEncoder, num_sink_tokens: int, num_blocks: int) -> EngineCore:
    return EngineCore(adapter, encoder.decode, num_blocks=num_blocks, num_sink_tokens=num_sink_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_called_what_it_was_asked_for_by(name: str) -> None:
    assert parse_policy(name).name == name


def test_link_0_is_naive_and_is_not_measured_twice() -> None:
    assert parse_policy("link:0") == parse_policy("naive") == Linked(LinkPolicy(0, 0))
    with pytest.raises(InvalidRequest, match="naive twice"):
        parse_policies("naive,link:4,link:0")


@pytest.mark.parametrize(
    "names",
    [
        *("", " , ", "magic", "link", "link:", "link:-1", "link:x", "sinks:0", "sinks:1+sinks:2"),
        *("cacheblend", "cacheblend:0", "cacheblend:1.5", "cacheblend:nan", "full,prefix:3", "full,full", "full;naive"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_accepted_forms(names: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_policies(names)
    assert refused.value.field == "policies"
    assert refused.value.actual.strip(" ,") in names


@pytest.mark.parametrize("preamble", [(256,), ()], ids=["bos", "no preamble"])
@pytest.mark.parametrize("name", NAMES)
def test_a_context_covers_every_token_once_and_its_counts_add_up(
    name: str, preamble: tuple[int, ...], adapter: ModelAdapter, encoder: TextEncoder
) -> None:
    policy, case = parse_policy(name), case_of(num_chunks=6, preamble=preamble)
    engine = engine_for(adapter, encoder, policy.num_sink_tokens, blocks_for(case))
    opened = policy.open(engine, case)
    opened.context.check_invariants()
    assert opened.context.num_tokens == case.num_context_tokens
    assert opened.recomputed_tokens + opened.reused_tokens == case.num_chunk_tokens
    opened.context.close()
    engine.pool.check_invariants()


def test_each_policy_recomputes_what_its_name_says(adapter: ModelAdapter, encoder: TextEncoder) -> None:
    case = case_of(num_chunks=6)
    engines = {sinks: engine_for(adapter, encoder, sinks, blocks_for(case)) for sinks in (0, 2)}

    def recomputed(name: str) -> int:
        policy = parse_policy(name)
        opened = policy.open(engines[policy.num_sink_tokens], case)
        opened.context.close()
        return opened.recomputed_tokens

    assert recomputed("full") == recomputed("link:1000") == recomputed("cacheblend:1") == case.num_chunk_tokens
    assert recomputed("naive") == recomputed("sinks:2") == 0
    assert recomputed("link:4") == recomputed("sinks:2+link:4") == 6 * 4
    assert recomputed("cacheblend:0.25") == round(0.25 * case.num_chunk_tokens)
    assert recomputed("prefix") == case.num_context_tokens - 128


def test_short_remainders_are_recomputed_whole_as_nodes_do(adapter: ModelAdapter, encoder: TextEncoder) -> None:
    case = case_of(num_chunks=4)
    opened = parse_policy(f"link:{CHUNK_TOKENS - 14}").open(engine_for(adapter, encoder, 0, blocks_for(case)), case)
    opened.context.close()
    # Chunks have 24, 25, 26 and 27 tokens: behind 10 link tokens the first two have fewer than 16 left.
    assert opened.recomputed_tokens == 24 + 25 + 10 + 10
