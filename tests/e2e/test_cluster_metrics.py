"""Metrics of a real cluster: scraped of each role before and after a request, as documented, as drawn."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from reuse_cluster import TEXTS, Cluster, a_cluster
from tiny_cluster import TENANT, WAIT_S, a_world
from tiny_gateway import a_gateway

from spolia import AsyncClient, Document
from spolia_node.server import NodeServer

ROOT = Path(__file__).parents[2]
ROLES = ("gateway", "prefill", "decode", "kvstore")
OF_UNKNOWN_TENANTS = {"spolia_engine_tokens_total", "spolia_store_tenant_bytes", "spolia_store_tenant_objects"}
"""Nodes behind the gateway hear of a tenant with its first request."""

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scraped(server: NodeServer) -> Series:
    """What Prometheus would read of a node now."""

    def page() -> str:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    families = text_string_to_metric_families(await asyncio.to_thread(page))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("spolia_")
    }


def total(series: Series, name: str, **labels: str) -> float:
    wanted = labels.items()
    found = [value for (named, at), value in series.items() if named == name and wanted <= dict(at).items()]
    assert found, (name, labels)
    return sum(found)


async def of_every_role(c: Cluster) -> dict[str, Series]:
    """Of the decode nodes the sum: either may have answered."""
    by_role: dict[str, Series] = {}
    for node in (c.gateway, *c.world.stores, *c.world.workers):
        counts: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for series in (by_role.get(node.server.role, {}), await scraped(node.server)):
            for key, value in series.items():
                counts[_without_node(key)] += value
        by_role[node.server.role] = dict(counts)
    return by_role


def _without_node(key: tuple[str, tuple[tuple[str, str], ...]]) -> tuple[str, tuple[tuple[str, str], ...]]:
    return key[0], tuple(label for label in key[1] if label[0] != "node_id")


async def test_every_role_shows_all_its_series_before_the_first_request_and_counts_it_after(tiny: Path) -> None:
    async with a_cluster(tiny) as c:
        before = await of_every_role(c)
        results = [await c.ask(TEXTS), await c.ask(TEXTS)]
        after = await of_every_role(c)
    assert set(before) == set(after) == set(ROLES)
    for role in ROLES:
        new = {name for name, labels in after[role].keys() - before[role].keys()}
        assert new <= OF_UNKNOWN_TENANTS, (role, new)
        assert before[role].keys() <= after[role].keys()
        # Nothing but what is going on anyway, and what a pool or a tier has room for, was counted yet.
        for (name, labels), value in before[role].items():
            if name.endswith(("_total", "_bucket", "_count", "_sum")) and not name.startswith("spolia_rpc_"):
                assert value == 0, (role, name, labels)
    gateway, decode, store = after["gateway"], after["decode"], after["kvstore"]
    prompt = sum(result.num_prompt_tokens for result in results)
    assert total(gateway, "spolia_prompt_tokens_total", tenant=TENANT) == prompt
    cached = sum(result.reuse.num_reused_tokens for result in results)
    assert total(gateway, "spolia_cached_tokens_total", tenant=TENANT) == cached > 0
    assert total(gateway, "spolia_computed_tokens_total", tenant=TENANT) == prompt - cached
    generated = sum(result.num_generated_tokens for result in results)
    assert total(gateway, "spolia_generation_tokens_total") == generated
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert total(gateway, f"spolia_{name}_count", mode="linked") == 2
        assert total(gateway, f"spolia_{name}_count", mode="exact") == 0
    assert total(gateway, "spolia_inter_token_latency_seconds_count", mode="linked") == generated - 2
    assert total(gateway, "spolia_request_success_total", mode="linked", finish_reason="length") == 2
    moved = sum(result.reuse.bytes_moved for result in results)
    assert total(gateway, "spolia_kv_transfer_bytes_total", plane="grpc") == moved > 0
    for name in ("queue", "prefill", "decode"):
        assert total(decode, f"spolia_request_{name}_time_seconds_count", mode="linked") == 2
    waited = [total(decode, f"spolia_request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode")]
    assert sum(waited) <= total(gateway, "spolia_e2e_request_latency_seconds_sum")
    assert total(decode, "spolia_kv_cache_blocks", state="cached") > 0
    assert total(decode, "spolia_kv_cache_usage_ratio") == 0, "nobody holds anything"
    assert total(after["prefill"], "spolia_engine_tokens_total", tenant=TENANT) == sum(map(len, TEXTS))
    assert total(store, "spolia_store_puts_total") >= len(TEXTS)
    for role in ROLES:
        assert total(after[role], "spolia_num_requests_running", role=role) == 0
    assert total(gateway, "spolia_rpc_requests_total", method="Generate", code="OK") == 2
    assert total(store, "spolia_rpc_requests_total", service="spolia.v1.KVStoreService", method="Put", code="OK") > 0


@dataclass
class Known:
    """A metric as the registries have it, or a document."""

    kind: str
    labels: set[str] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)


async def known_metrics(tiny: Path) -> dict[str, Known]:
    """Every metric of every role, with its labels, once a request has been answered."""
    async with a_world(tiny) as world:
        store = await world.store()
        workers = [await world.prefill(), await world.decode(shadow_share=1.0)]
        async with (
            a_gateway(world, TENANT, http_port=0) as gateway,
            AsyncClient(gateway.server.address, timeout_s=WAIT_S) as client,
            httpx2.AsyncClient(base_url=f"http://{gateway.http_address}", timeout=WAIT_S) as http,
        ):
            await client.generate([Document(TEXTS[0]), "WHO?"], mode="linked", max_tokens=2)
            assert (await http.get("/version")).status_code == 200
            known: dict[str, Known] = {}
            for node in (gateway, store, *workers):
                for family in node.server.metrics.registry.collect():
                    name = family.name + ("_total" if family.type == "counter" else "")
                    metric = known.setdefault(name, Known(family.type))
                    metric.roles.add(node.server.role)
                    metric.labels |= {label for sample in family.samples for label in sample.labels} - {"le"}
            return known


ROW = re.compile(r"\| `(?P<name>spolia_\w+)(\{(?P<labels>[\w,]+)\})?` \| (?P<kind>\w+) \| (?P<roles>[\w, ]+) \| .+ \|")


def documented() -> dict[str, Known]:
    found: dict[str, Known] = {}
    for row in map(ROW.fullmatch, (ROOT / "docs" / "observability.md").read_text().splitlines()):
        if row is not None:
            roles = set(ROLES) if row["roles"] == "all" else set(row["roles"].split(", "))
            assert row["name"] not in found, f"{row['name']} stands there twice"
            found[row["name"]] = Known(row["kind"], set((row["labels"] or "").split(",")) - {""}, roles)
    return found


def drawn() -> Iterator[str]:
    """Every query of the dashboard, its variables too."""
    dashboard = json.loads((ROOT / "docker" / "grafana" / "spolia.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (each["definition"] for each in dashboard["templating"]["list"] if "definition" in each)


NAME = re.compile(r"\b((?:spolia|process)_[a-z0-9_]+)(?:\{([^}]*)\})?")
BY = re.compile(r"\bby \(([^)]*)\)")
UNDER_TLS = {
    "spolia_key_book_reads_total",
    "spolia_refused_calls_total",
    "spolia_tls_certificate_expiry_timestamp_seconds",
    "spolia_tls_handshakes_total",
}
"""Have no series without certificates and keys."""
ADDED = {"le", "instance", "job"}
"""Labels of buckets, and those that Prometheus adds."""


async def test_the_document_and_the_dashboard_name_what_there_is(tiny: Path) -> None:
    known = await known_metrics(tiny)
    own = {name: metric for name, metric in known.items() if name.startswith("spolia_")}
    described = {name: metric for name, metric in documented().items() if name not in UNDER_TLS}
    assert set(described) == set(own) - UNDER_TLS
    for name, metric in own.items():
        if name in UNDER_TLS:
            continue
        assert described[name] == metric, name
    used: set[str] = set()
    for query in drawn():
        labels = {label.strip() for by in BY.findall(query) for label in by.split(",")}
        metrics = []
        for name, selector in NAME.findall(query):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            is_histogram = base in known and known[base].kind == "histogram"
            assert (base if is_histogram else name) in known, query
            assert is_histogram == (base != name), query
            metrics.append(known[base if is_histogram else name])
            selected = {each.split("=")[0].rstrip("!~") for each in selector.split(",") if each}
            assert selected <= metrics[-1].labels | ADDED, query
            used.add(base if is_histogram else name)
        assert all(labels <= metric.labels | ADDED for metric in metrics), query
    main = {"time_to_first_token_seconds", "inter_token_latency_seconds", "kv_cache_usage_ratio", "cached_tokens_total"}
    assert used >= {f"spolia_{name}" for name in main}
