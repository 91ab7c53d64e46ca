"""Reuse as a client sees it: requests go where their documents are, and what goes wrong is counted and costs time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from reuse_cluster import LINK_TOKENS, TEXTS, a_cluster
from tiny_cluster import TENANT, damage

from spolia import TokenSource
from spolia_core.reuse import MissReason


def num_reusable(texts: Sequence[str]) -> int:
    return sum(len(text) - LINK_TOKENS for text in texts)


async def test_documents_in_every_order_go_to_the_node_that_holds_them_and_answer_alike(tiny: Path) -> None:
    async with a_cluster(tiny) as c:
        cold = await c.ask(TEXTS)
        holder, ids = c.served_by(cold), [await c.chunk_id(text) for text in TEXTS]
        for order in permutations(TEXTS):
            # Listed as busy with the request before, it could be worse than a node that holds nothing.
            await c.sees(holder, lambda record: set(ids) <= set(record.held_chunks) and not record.load.num_running)
            warm = await c.ask(order)
            assert c.served_by(warm) is holder, "each order has another rendezvous"
            assert warm.reuse.sources[TokenSource.DEVICE] >= num_reusable(TEXTS)
            assert warm.token_ids == await c.in_one_process(order)


async def test_a_view_that_is_old_costs_time_and_no_answer(tiny: Path) -> None:
    """The node listed as the holder is not the one that would be asked otherwise, and holds nothing any more."""
    async with a_cluster(tiny) as c:
        text = TEXTS[1]
        cold, chunk_id = await c.ask([text]), await c.chunk_id(text)
        home = c.served_by(cold)
        holder = c.other_than(home)
        await c.ask_node(holder, [text])
        assert home.engine.resident.drop(chunk_id)
        await c.sees(home, lambda record: chunk_id not in record.held_chunks and not record.load.num_running)
        await c.sees(holder, lambda record: chunk_id in record.held_chunks and not record.load.num_running)
        warm = await c.ask([text])
        assert c.served_by(warm) is holder, "it goes where its bytes are"
        assert warm.reuse.sources[TokenSource.DEVICE] >= num_reusable([text])
        await c.sees(holder, lambda record: chunk_id in record.held_chunks and not record.load.num_running)
        await c.gateway.cluster.stop()  # what the gateway knows stays as it is
        assert holder.engine.resident.drop(chunk_id)
        stale = await c.ask([text])
        assert c.served_by(stale) is holder
        assert stale.reuse.sources[TokenSource.HOST] >= num_reusable([text]), "it came from the store instead"
        assert cold.token_ids == warm.token_ids == stale.token_ids == await c.in_one_process([text])


async def test_a_damaged_chunk_is_answered_right_and_counted_by_the_gateway(tiny: Path) -> None:
    async with a_cluster(tiny) as c:
        text = TEXTS[1]
        cold, chunk_id = await c.ask([text]), await c.chunk_id(text)
        (store,) = c.world.stores
        damage(store, chunk_id)
        for node in c.decodes.values():
            node.engine.resident.drop(chunk_id)
        metrics = c.gateway.server.metrics
        labels = {"tenant": TENANT, "kind": "local", "reason": "digest"}
        assert metrics.value("spolia_cache_misses_total", **labels) == 0
        again = await c.ask([text])
        assert again.token_ids == cold.token_ids == await c.in_one_process([text])
        assert [miss.reason for miss in again.reuse.misses if miss.chunk_id == chunk_id] == [MissReason.DIGEST]
        assert metrics.value("spolia_cache_misses_total", **labels) == 1
        assert metrics.value("spolia_cache_missed_tokens_total", **labels) == len(text)


async def test_metrics_say_what_answers_said(tiny: Path) -> None:
    async with a_cluster(tiny) as c:
        results = [await c.ask(TEXTS), await c.ask(TEXTS[::-1])]
        value = c.gateway.server.metrics.value
        for source in TokenSource:
            told = sum(result.reuse.sources.get(source, 0) for result in results)
            labels = {"tenant": TENANT, "source": source.name.lower()}
            cached, computed = (value(f"spolia_{how}_tokens_total", **labels) for how in ("cached", "computed"))
            assert told == cached + computed
            assert not (cached and computed)
        told = sum(result.num_prompt_tokens for result in results)
        assert value("spolia_prompt_tokens_total", tenant=TENANT) == told
        for kind in ("chunk", "live", "inline"):
            told = sum(getattr(t, f"{kind}_bytes") for result in results for t in result.reuse.transfers)
            assert value("spolia_kv_transfer_bytes_total", tenant=TENANT, kind=kind, plane="grpc") == told
        missed = sum(miss.num_tokens for result in results for miss in result.reuse.misses)
        assert missed >= sum(map(len, TEXTS))
        families = c.gateway.server.metrics.registry.collect()
        samples = [sample for family in families for sample in family.samples]
        assert sum(s.value for s in samples if s.name == "spolia_cache_missed_tokens_total") == missed
        assert value("spolia_time_to_first_token_seconds_count", mode="linked") == 2
