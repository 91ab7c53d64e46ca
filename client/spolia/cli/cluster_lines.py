"""A cluster as lines of text, for pipes and for `--once`."""

from __future__ import annotations

from spolia.cli.output import notes, print_columns
from spolia.cli.units import human_bytes, human_ms, percent
from spolia.results import Cluster, Node, ServingFigures
from spolia.store_results import TierStats

LOAD = ("running", "waiting", "held chunks")
LEDGER = ("blocks", "free", "referenced", "cached", "in transfer", "lent")
"""A pool's blocks, and how many are in each state."""

COLUMNS = ("node", "role", "address", "model", "profile", "linked", *LOAD, *LEDGER, "state")


SERVING = ("gateway", "requests", "hit rate", "ttft p50", "p95", "itl p50", "p95", "tokens/s")
TIERS = ("store", "tier", "objects", "used", "budget", "hits", "evictions", "state")
REQUESTS = ("request", "tenant", "phase", "age", "mode", "prompt", "generated", "decode node")


def print_cluster(found: Cluster) -> None:
    """Prints nodes, and what there is to say of gateways, tiers and requests in flight."""
    nodes = sorted(found.nodes, key=lambda node: (node.role, node.node_id))
    print_columns(COLUMNS, *[_cells(node, found.state_of(node)) for node in nodes])
    _print_under(SERVING, [serving_cells(node.node_id, node.serving) for node in nodes if node.serving is not None])
    _print_under(TIERS, [tier_cells(node.node_id, tier) for node in nodes for tier in node.tiers])
    _print_under(REQUESTS, request_rows(found))
    for refusal in dict.fromkeys(node.linked_refusal for node in nodes if node.linked_refusal):
        who = ", ".join(node.node_id for node in nodes if node.linked_refusal == refusal)
        notes().print(f"{who} refuse LINKED: {refusal}", markup=False)
    if not found.directory_reachable:
        notes().print("the directory cannot be reached; this is the last list the gateway knew")


def serving_cells(node_id: str, figures: ServingFigures) -> tuple[str, ...]:
    """A gateway's last minute, under `SERVING`."""
    return (
        node_id,
        str(figures.num_requests),
        "-" if figures.hit_rate is None else percent(figures.hit_rate),
        *(
            human_ms(ms) if ms else "-"
            for ms in (figures.ttft_p50_ms, figures.ttft_p95_ms, figures.itl_p50_ms, figures.itl_p95_ms)
        ),
        f"{figures.num_generated_tokens / max(1, figures.window_s):.1f}",
    )


def tier_cells(node_id: str, tier: TierStats) -> tuple[str, ...]:
    """A tier of a store, under `TIERS`."""
    sizes = human_bytes(tier.used_bytes), human_bytes(tier.budget_bytes)
    counts = str(tier.hits), str(tier.evictions)
    return node_id, tier.tier, str(tier.num_objects), *sizes, *counts, "healthy" if tier.healthy else "failing"


def request_rows(found: Cluster) -> list[tuple[str, ...]]:
    """Requests in flight, under `REQUESTS`."""
    return [
        (
            request.request_id,
            request.tenant_id or "-",
            request.phase,
            human_ms(request.age_ms),
            request.mode.name.lower(),
            str(request.num_prompt_tokens or "-"),
            str(request.num_generated_tokens),
            request.decode_node or "-",
        )
        for request in found.requests
    ]


def _print_under(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if rows:
        print()
        print_columns(head, *rows)


def _cells(node: Node, state: str) -> tuple[str, ...]:
    load = (node.num_running, node.num_waiting, node.num_held_chunks)
    model = (node.model, node.profile, linked_terms(node))
    return (node.node_id, node.role, node.address, *model, *map(str, load), *_ledger(node), state)


def linked_terms(node: Node) -> str:
    """What the node's profile prescribes where LINKED is served; else whether force helps."""
    if node.linked_refusal:
        return "if forced" if node.can_force_linked else "no"
    return node.policy


def _ledger(node: Node) -> tuple[str, ...]:
    if not node.total_blocks:  # it has no pool
        return ("",) * len(LEDGER)
    in_each_state = (
        node.free_blocks,
        node.referenced_blocks,
        node.cached_blocks,
        node.in_transfer_blocks,
        node.lent_blocks,
    )
    return tuple(map(str, (node.total_blocks, *in_each_state)))
