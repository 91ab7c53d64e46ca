"""The network lets through what a certificate would, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from k8s_world import COMPONENT, CONFIGS, NAME, Manifests, Object, selects

from spolia_core.node_name import CERTIFIED_ROLES, NODE_ROLES, OPERATOR
from spolia_node.edges import DECODE, DIRECTORY, EDGES, GATEWAY, KVSTORE, PEER, PREFILL

SERVED_BY = {DECODE: "decode", PEER: "decode", PREFILL: "prefill", KVSTORE: "kvstore", DIRECTORY: "kvstore"}
"""Which role's port a service is on. Health and reflection are on all, and no way in: a probe runs in its pod."""

DNS_PORTS = {("UDP", 53), ("TCP", 53)}


def edges() -> set[tuple[str, str]]:
    """(caller, called) of the design. Whoever wants something of the cluster asks a gateway, so an operator does."""
    found = {(OPERATOR, "gateway")}
    for path, callers in EDGES.items():
        service = path.split("/")[0]
        if service in SERVED_BY:
            found |= {(caller, SERVED_BY[service]) for caller in callers}
    return found


def labels_of(role: str) -> dict[str, str]:
    return {NAME: "spolia", COMPONENT: role}


def policies_of(manifests: Manifests, role: str) -> list[Object]:
    return [
        found["spec"]
        for found in manifests.of("NetworkPolicy")
        if selects(found["spec"]["podSelector"], labels_of(role))
    ]


def pods_in(peers: list[Object]) -> set[str]:
    """Roles of this namespace that a rule names."""
    return {
        role
        for peer in peers
        if set(peer) == {"podSelector"}
        for role in CERTIFIED_ROLES
        if selects(peer["podSelector"], labels_of(role))
    }


def ports_in(rule: Object) -> set[object]:
    assert all(port["protocol"] in ("TCP", "UDP") for port in rule["ports"])
    return {port["port"] for port in rule["ports"]}


def rules(manifests: Manifests, role: str, way: str) -> Iterator[Object]:
    for policy in policies_of(manifests, role):
        yield from policy.get(way, [])


def test_every_edge_of_the_design_is_known_here() -> None:
    """A new service must say whose port it is on."""
    here = {*SERVED_BY, GATEWAY}
    assert {path.split("/")[0] for path in EDGES if path.startswith("spolia.")} <= here


def test_the_ways_into_a_node_are_the_edges_of_the_design(manifests: Manifests) -> None:
    found = set()
    for role in NODE_ROLES:
        for rule in rules(manifests, role, "ingress"):
            if ports_in(rule) == {"grpc"} and "from" in rule:
                found |= {(caller, role) for caller in pods_in(rule["from"])}
    assert found | {(OPERATOR, "gateway")} == edges()


def test_the_ways_out_of_a_node_are_the_same_edges(manifests: Manifests) -> None:
    found = set()
    for role in CERTIFIED_ROLES:
        for rule in rules(manifests, role, "egress"):
            found |= {(role, called) for called in pods_in(rule["to"])}
            if pods_in(rule["to"]):
                assert ports_in(rule) == {"grpc"}
    assert found == edges()


def test_anyone_reaches_a_gateway_by_the_ports_of_users_and_nothing_else(manifests: Manifests) -> None:
    open_to_all = defaultdict(set)
    for role in NODE_ROLES:
        for rule in rules(manifests, role, "ingress"):
            if "from" not in rule:
                open_to_all[role] |= ports_in(rule)
    assert open_to_all == {"gateway": {"grpc", "http"}}


def test_what_no_policy_opens_is_closed_both_ways(manifests: Manifests) -> None:
    for role in CERTIFIED_ROLES:
        ways = {way for policy in policies_of(manifests, role) for way in policy["policyTypes"]}
        assert ways == {"Ingress", "Egress"}
    for found in manifests.workloads:
        assert found.role in CONFIGS


def test_nothing_else_leaves_but_questions_to_dns_and_the_stores_to_redis(manifests: Manifests) -> None:
    for role in CERTIFIED_ROLES:
        for rule in rules(manifests, role, "egress"):
            if pods_in(rule["to"]):
                continue
            ports = {(port["protocol"], port["port"]) for port in rule["ports"]}
            if all("ipBlock" in peer for peer in rule["to"]):
                assert role == "kvstore"
                assert ports <= {("TCP", 6379), ("TCP", 26379)}
            else:
                assert ports == DNS_PORTS


def test_stores_reach_redis_exactly_where_they_have_one(manifests: Manifests) -> None:
    ways = [rule for rule in rules(manifests, "kvstore", "egress") if all("ipBlock" in peer for peer in rule["to"])]
    assert bool(ways) == ("SPOLIA_REDIS_URL" in manifests.workload("kvstore").environment)


def test_metrics_are_for_prometheus_only(manifests: Manifests) -> None:
    monitored = bool(manifests.of("ServiceMonitor"))
    for role in NODE_ROLES:
        ways = [rule for rule in rules(manifests, role, "ingress") if "metrics" in ports_in(rule)]
        assert bool(ways) == monitored
        for rule in ways:
            assert all({"namespaceSelector", "podSelector"} == set(peer) for peer in rule["from"])
