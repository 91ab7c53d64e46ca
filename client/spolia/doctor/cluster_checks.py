"""Whether the cluster is there, whole, of one release, and on time. Needs an operator's key."""

from __future__ import annotations

import time
from collections import Counter

from spolia.cli.units import counted, human_bytes
from spolia.client import Client
from spolia.doctor.finding import Finding, State
from spolia.errors import Forbidden
from spolia.results import Cluster, Model
from spolia.store_results import TierStats
from spolia.version import __version__

CLOCK_WARNING_S = 5.0
CLOCK_FAILURE_S = 60.0
"""Certificates made a moment ago begin five minutes ago; keys end to the second."""


def reach(client: Client) -> tuple[Finding, list[Model]]:
    """Asks for the models; raises what the call raises when nobody answers, or the key is none."""
    started = time.monotonic()
    models = client.models()
    took_ms = (time.monotonic() - started) * 1e3
    facts = {"took_ms": round(took_ms, 1), "models": [model.name for model in models]}
    if not models:
        return Finding("gateway", State.FAILED, "answers, and no decode node serves a model", facts), models
    names = ", ".join(model.name for model in models)
    return Finding("gateway", State.OK, f"answers in {took_ms:.0f} ms; serves {names}", facts), models


def look_at(client: Client) -> tuple[list[Finding], Cluster | None]:
    """Everything that the gateway's view of the cluster says."""
    sent_s = time.time()
    try:
        cluster = client.cluster()
    except Forbidden:
        said = "needs an operator's key: SPOLIA_API_KEY, or --keys"
        return [Finding(name, State.SKIPPED, said) for name in ("nodes", "stores", "versions", "clock")], None
    middle_s = (sent_s + time.time()) / 2
    return [_nodes(cluster), _stores(cluster), _versions(cluster), _clock(cluster, middle_s)], cluster


def _nodes(cluster: Cluster) -> Finding:
    counts = Counter(node.role for node in cluster.nodes)
    facts = {"nodes": dict(counts), "draining": [node.node_id for node in cluster.nodes if node.draining]}
    said = ", ".join(f"{count} {role}" for role, count in sorted(counts.items()))
    if not cluster.directory_reachable:
        return Finding("nodes", State.FAILED, f"the directory cannot be reached; last known: {said}", facts)
    missing = [role for role in ("decode", "kvstore") if not counts[role]]
    if missing:
        return Finding("nodes", State.FAILED, f"no {' and no '.join(missing)} node: {said}", facts)
    if not counts["prefill"] or facts["draining"]:
        return Finding("nodes", State.WARNING, f"no prefill node, or nodes that drain: {said}", facts)
    return Finding("nodes", State.OK, said, facts)


def _stores(cluster: Cluster) -> Finding:
    """What the stores hold, tier by tier: a chunk may be on both."""
    tiers = [(node.node_id, tier) for node in cluster.nodes for tier in node.tiers]
    facts = {
        "tiers": [
            {"store": store, "tier": t.tier, "num_objects": t.num_objects, "used_bytes": t.used_bytes}
            for store, t in tiers
        ]
    }
    if not tiers:
        return Finding("stores", State.SKIPPED, "no store says what it holds", facts)
    kinds = {"RAM": [t for _, t in tiers if t.tier == "ram"], "disk": [t for _, t in tiers if t.tier == "disk"]}
    said = ", ".join(f"{where}: {_sum_of(those)}" for where, those in kinds.items() if those)
    failing = [f"{store}'s {tier.tier}" for store, tier in tiers if not tier.healthy]
    if failing:
        return Finding("stores", State.FAILED, f"{', '.join(failing)} takes no chunks now; {said}", facts)
    return Finding("stores", State.OK, said, facts)


def _sum_of(tiers: list[TierStats]) -> str:
    num_objects, used_bytes = sum(tier.num_objects for tier in tiers), sum(tier.used_bytes for tier in tiers)
    return f"{counted(num_objects, 'chunk')}, {human_bytes(used_bytes)}"


def _versions(cluster: Cluster) -> Finding:
    found = Counter(node.version for node in cluster.nodes)
    facts = {"nodes": dict(found), "here": __version__}
    if set(found) == {__version__}:
        return Finding("versions", State.OK, f"all {__version__}", facts)
    said = ", ".join(f"{count} × {version or 'unknown'}" for version, count in sorted(found.items()))
    return Finding("versions", State.WARNING, f"nodes: {said}; here {__version__}", facts)


def _clock(cluster: Cluster, middle_s: float) -> Finding:
    if not cluster.clock_s:
        return Finding("clock", State.SKIPPED, "the gateway is of a release that does not tell its time")
    ahead_s = cluster.clock_s - middle_s
    facts = {"gateway_ahead_s": round(ahead_s, 3)}
    said = f"the gateway's is {abs(ahead_s):.1f} s {'ahead' if ahead_s >= 0 else 'behind'}"
    if abs(ahead_s) > CLOCK_FAILURE_S:
        return Finding("clock", State.FAILED, f"{said}; keys and certificates end at the wrong time", facts)
    return Finding("clock", State.WARNING if abs(ahead_s) > CLOCK_WARNING_S else State.OK, said, facts)
