"""The manifests as objects: they are built, Kubernetes knows them, and what names another finds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

import kubernetes_validate
import pytest
import yaml
from k8s_world import (
    COMPONENT,
    CONFIGS,
    INSTALLATIONS,
    K8S,
    NAME,
    ROOT,
    Manifests,
    Object,
    amount,
    build,
    manifests_in,
    selects,
    sources,
)

from spolia.version import __version__

NEWEST = kubernetes_validate.utils.all_versions()[-3:]
OF_OPERATORS = {
    ("cert-manager.io/v1", "Certificate"),
    ("cert-manager.io/v1", "Issuer"),
    ("keda.sh/v1alpha1", "ScaledObject"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"),
}
"""Kinds that Kubernetes learns from somebody else: no schema of its own knows them."""

IMAGES = {
    "gateway": {"spolia-gateway"},
    "kvstore": {"spolia-kvstore"},
    "prefill": {"spolia-worker-cpu", "spolia-worker-cuda"},
    "decode": {"spolia-worker-cpu", "spolia-worker-cuda"},
}


@pytest.mark.parametrize("overlay", sorted(path.name for path in (K8S / "overlays").iterdir()))
def test_every_overlay_builds_as_it_stands(overlay: str) -> None:
    assert {found.role for found in manifests_in(build(K8S / "overlays" / overlay)).workloads} == set(CONFIGS)


def test_every_component_and_overlay_is_in_an_installation_that_is_tested() -> None:
    tested = {part for parts in INSTALLATIONS.values() for part in parts}
    for path in sources():
        if path.name == "kustomization.yaml" and path.parent.parent.name == "overlays":
            found = yaml.safe_load(path.read_text())
            tested |= {component.removeprefix("../../") for component in found.get("components", [])}
    tested |= {"components/redis"}  # of the two for Redis
    assert tested == {str(path.relative_to(K8S)) for path in K8S.glob("[co]*/*") if path.is_dir()}


def test_kubernetes_knows_every_object(built: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = kubernetes_validate.utils.schema_contents
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", cache(read))  # which reads megabytes each time
    assert len(NEWEST) == 3
    seen: list[Object] = []
    for text in built.values():
        for found in manifests_in(text).objects:
            if found in seen or (found["apiVersion"], found["kind"]) in OF_OPERATORS:
                continue
            seen.append(found)
            for version in NEWEST:
                kubernetes_validate.validate(found, version, strict=True)


def test_validation_would_find_a_field_that_does_not_exist(production: Manifests) -> None:
    gateway = yaml.safe_load(yaml.safe_dump(production.workload("gateway").object))
    gateway["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(gateway, NEWEST[-1], strict=True)


def test_the_model_loader_is_known_and_restricted() -> None:
    pod = yaml.safe_load((K8S / "overlays/gpu/model-loader.yaml").read_text())
    kubernetes_validate.validate(pod, NEWEST[-1], strict=True)
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"spolia-kvstore:{__version__}"
    assert_restricted(pod["spec"])


def test_objects_lie_in_one_namespace_under_names_of_their_own(manifests: Manifests) -> None:
    names = Counter((found["kind"], found["metadata"]["name"]) for found in manifests.objects)
    assert set(names.values()) == {1}
    for found in manifests.objects:
        if found["kind"] not in ("Namespace", "PersistentVolume"):
            assert found["metadata"]["namespace"] == "spolia", found["metadata"]
    labels = manifests.named("Namespace", "spolia")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pods_run_the_service_of_their_role_from_its_image(manifests: Manifests) -> None:
    assert sorted(found.role for found in manifests.workloads) == sorted(CONFIGS)
    for found in manifests.workloads:
        assert found.name == f"spolia-{found.role}"
        assert found.container["command"] == ["python", "-m", f"spolia_{found.role}"]
        assert (ROOT / "services" / found.role / f"spolia_{found.role}" / "__main__.py").is_file()
        assert "args" not in found.container
        assert found.image in IMAGES[found.role]
        assert found.container["image"] == f"{found.image}:{__version__}"
        assert found.image.endswith("cuda") == (found.environment.get("SPOLIA_DEVICE") == "cuda")


def test_selectors_find_the_pods_they_mean(manifests: Manifests) -> None:
    for found in manifests.workloads:
        spec = found.object["spec"]
        assert selects(spec["selector"], found.labels)
        assert manifests.selected_by(spec["selector"]) == {found.role}
        for constraint in found.pod["topologySpreadConstraints"]:
            assert manifests.selected_by(constraint["labelSelector"]) == {found.role}
        if found.kind == "StatefulSet":
            assert manifests.named("Service", spec["serviceName"])["spec"]["clusterIP"] == "None"
    for service in manifests.of("Service"):
        roles = manifests.selected_by({"matchLabels": service["spec"]["selector"]})
        assert roles == {service["metadata"]["labels"][COMPONENT]}
        (role,) = roles
        for port in service["spec"]["ports"]:
            assert manifests.workload(role).ports[port["targetPort"]] == port["port"]
    for budget in manifests.of("PodDisruptionBudget"):
        roles = manifests.selected_by(budget["spec"]["selector"])
        assert {f"spolia-{role}" for role in roles} == {budget["metadata"]["name"]}
    assert len(manifests.of("PodDisruptionBudget")) == len(CONFIGS)


def test_every_role_is_reached_pod_by_pod(manifests: Manifests) -> None:
    """Connections of gRPC last: who is to spread calls must see every address."""
    headless = [found for found in manifests.of("Service") if found["spec"].get("clusterIP") == "None"]
    for role in CONFIGS:
        (service,) = [found for found in headless if found["metadata"]["labels"][COMPONENT] == role]
        assert {port["name"] for port in service["spec"]["ports"]} == {"grpc", "metrics"}


def test_claims_that_pods_name_are_there_or_made_for_them(manifests: Manifests) -> None:
    claims = {found["metadata"]["name"] for found in manifests.of("PersistentVolumeClaim")}
    for found in manifests.workloads:
        for volume in found.volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        assert {mount["name"] for mount in found.mounts.values()} == set(found.volumes)


def test_requests_are_within_limits_and_gpus_go_to_workers_that_use_them(manifests: Manifests) -> None:
    for found in manifests.workloads:
        requests, limits = found.container["resources"]["requests"], found.container["resources"]["limits"]
        assert amount(requests["memory"]) <= amount(limits["memory"])
        assert amount(requests["cpu"]) > 0
        on_gpu = found.environment.get("SPOLIA_DEVICE") == "cuda"
        assert amount(limits.get("nvidia.com/gpu", 0)) == (1 if on_gpu else 0)


def test_a_rollout_takes_no_node_away_before_another_serves_but_where_that_wants_a_gpu(manifests: Manifests) -> None:
    for found in manifests.workloads:
        if found.kind == "Deployment":
            rolling = found.object["spec"]["strategy"]["rollingUpdate"]
            on_gpu = found.environment.get("SPOLIA_DEVICE") == "cuda"
            assert (rolling["maxSurge"], rolling["maxUnavailable"]) == ((0, 1) if on_gpu else (1, 0))


def assert_restricted(pod: Mapping[str, object]) -> None:
    """What the Pod Security Standard `restricted` asks, and a root file system that nobody writes."""
    context = pod["securityContext"]
    assert isinstance(context, dict)
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == context["runAsGroup"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
    containers, volumes = pod["containers"], pod["volumes"]
    assert isinstance(containers, list)
    assert isinstance(volumes, list)
    for container in containers:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not any("hostPort" in port for port in container.get("ports", []))
    for volume in volumes:
        assert set(volume) <= {"name", "configMap", "emptyDir", "persistentVolumeClaim", "secret"}, volume


def test_pods_are_restricted_and_know_nothing_of_kubernetes(manifests: Manifests) -> None:
    account = manifests.named("ServiceAccount", "spolia")
    assert account["automountServiceAccountToken"] is False
    assert not manifests.of("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    for found in manifests.workloads:
        assert_restricted(found.pod)
        assert found.pod["serviceAccountName"] == "spolia"
        assert found.pod["automountServiceAccountToken"] is False
        assert found.pod["enableServiceLinks"] is False, "a Service's name would make settings: SPOLIA_…_PORT"


def test_only_the_store_writes_to_a_volume(manifests: Manifests) -> None:
    for found in manifests.workloads:
        writable = {path for path, mount in found.mounts.items() if not mount.get("readOnly")}
        assert writable == ({"/tmp", "/data"} if found.role == "kvstore" else {"/tmp"})


def test_labels_say_what_a_pod_is(manifests: Manifests) -> None:
    for found in manifests.workloads:
        assert found.labels[NAME] == "spolia"
        assert found.labels[COMPONENT] in CONFIGS
