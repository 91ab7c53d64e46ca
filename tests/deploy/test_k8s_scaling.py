"""What scales nodes and wakes people looks at metrics that nodes have."""

from __future__ import annotations

import re
from collections.abc import Mapping

import promql
import pytest
from k8s_world import NAME, ROOT, Manifests, Object, manifests_in


@pytest.fixture
def with_keda(built: Mapping[str, str]) -> Manifests:
    return manifests_in(built["gpu with keda and a Redis Cluster"])


def target_of(found: Object) -> tuple[str, str]:
    target = found["spec"]["scaleTargetRef"]
    return target["kind"], target["name"]


def test_the_autoscaler_looks_at_gauges_of_the_pods_it_scales(production: Manifests) -> None:
    known = promql.documented()
    scalers = production.of("HorizontalPodAutoscaler")
    assert {target_of(found) for found in scalers} == {
        ("Deployment", "spolia-prefill"),
        ("StatefulSet", "spolia-decode"),
    }
    for found in scalers:
        role = target_of(found)[1].removeprefix("spolia-")
        for metric in found["spec"]["metrics"]:
            assert metric["type"] == "Pods"
            gauge = known[metric["pods"]["metric"]["name"]]
            assert gauge.kind == "gauge"
            assert gauge.roles & {role, "all"}
    assert {metrics_of(found) for found in scalers} == {
        ("spolia_queued_tokens",),
        ("spolia_kv_cache_usage_ratio", "spolia_num_requests_waiting"),
    }


def metrics_of(found: Object) -> tuple[str, ...]:
    return tuple(metric["pods"]["metric"]["name"] for metric in found["spec"]["metrics"])


def test_keda_asks_the_same(production: Manifests, with_keda: Manifests) -> None:
    known = promql.documented()
    asked = {}
    for found in with_keda.of("ScaledObject"):
        for trigger in found["spec"]["triggers"]:
            assert trigger["metricType"] == "AverageValue", "the threshold is for a pod, and so must the metric be"
            query = trigger["metadata"]["query"]
            promql.check(query, known)
            assert query.startswith("sum(")
            ((name, _),) = promql.series_in(query)
            asked[target_of(found)[1], name] = float(trigger["metadata"]["threshold"])
    wanted = {}
    for found in production.of("HorizontalPodAutoscaler"):
        for metric in found["spec"]["metrics"]:
            value = metric["pods"]["target"]["averageValue"]
            number = float(value.removesuffix("m")) * (1e-3 if value.endswith("m") else 1)
            wanted[target_of(found)[1], metric["pods"]["metric"]["name"]] = number
    assert asked == pytest.approx(wanted)


def test_queries_that_name_pods_mean_those_of_a_workload(with_keda: Manifests) -> None:
    names = {f"{found.name}-0" for found in with_keda.workloads}
    for found in with_keda.of("ScaledObject"):
        for trigger in found["spec"]["triggers"]:
            for pattern in re.findall(r'pod=~"([^"]+)"', trigger["metadata"]["query"]):
                assert [name for name in names if re.fullmatch(pattern, name)] == [f"{target_of(found)[1]}-0"]


def test_an_autoscaler_alone_says_how_many(manifests: Manifests) -> None:
    scaled = {target_of(found)[1] for found in manifests.of("HorizontalPodAutoscaler", "ScaledObject")}
    for found in manifests.workloads:
        assert ("replicas" in found.object["spec"]) == (found.name not in scaled)
    for found in manifests.of("HorizontalPodAutoscaler"):
        assert found["spec"]["minReplicas"] >= 2
    for found in manifests.of("ScaledObject"):
        assert found["spec"]["minReplicaCount"] >= found["spec"]["fallback"]["replicas"]


def test_alerts_name_what_nodes_have_and_stand_in_the_runbook(production: Manifests) -> None:
    known = promql.documented()
    runbook = (ROOT / "docs" / "operate.md").read_text()
    (rules,) = production.of("PrometheusRule")
    names = []
    for group in rules["spec"]["groups"]:
        for rule in group["rules"]:
            promql.check(rule["expr"], known)
            names.append(rule["alert"])
            assert f"`{rule['alert']}`" in runbook
    assert len(names) == len(set(names)) > 5
    assert set(re.findall(r"`(Spolia\w+)`", runbook)) == set(names)


def test_prometheus_reads_every_role_once(production: Manifests) -> None:
    (monitor,) = production.of("ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted[NAME] == "spolia"
    read = [
        production.selected_by({"matchLabels": service["spec"]["selector"]})
        for service in production.of("Service")
        if wanted.items() <= service["metadata"]["labels"].items()
    ]
    assert sorted(role for roles in read for role in roles) == ["decode", "gateway", "kvstore", "prefill"]
    (endpoint,) = monitor["spec"]["endpoints"]
    for service in production.of("Service"):
        if wanted.items() <= service["metadata"]["labels"].items():
            assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
