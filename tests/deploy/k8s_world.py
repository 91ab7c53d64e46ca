"""The manifests as Kubernetes gets them: built by kubectl or kustomize, whichever is on PATH, and read."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from spolia_decode.config import DecodeConfig
from spolia_gateway.config import GatewayConfig
from spolia_kvstore.config import KVStoreConfig
from spolia_node.config import NodeConfig
from spolia_prefill.config import PrefillConfig

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
BUILD_TIMEOUT_S = 60

CONFIGS: Mapping[str, type[NodeConfig]] = {
    "gateway": GatewayConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "kvstore": KVStoreConfig,
}
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"

INSTALLATIONS: Mapping[str, tuple[str, ...]] = {
    "cpu-demo": ("overlays/cpu-demo",),
    "gpu": ("overlays/gpu",),
    "production": ("overlays/production",),
    "gpu with keda and a Redis Cluster": (
        "overlays/gpu",
        "components/keda",
        "components/redis-cluster",
        "components/monitoring",
    ),
    "cpu-demo with cert-manager": ("overlays/cpu-demo", "components/cert-manager"),
}
"""Each overlay, and what its comments say may be exchanged or added: an overlay, then components."""

POD_IP = "10.1.2.3"
SECRETS = {
    ("spolia-cluster", "cluster-secret"): "something-nobody-guesses",
    ("spolia-redis", "url"): "redis+cluster://:password@redis-0:6379",
}
"""What a user puts there (k8s/create-secrets), for the pods that read it from their environment."""

Object = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A Deployment or StatefulSet of nodes, with the ConfigMaps it reads."""

    kind: str
    object: Object
    maps: Mapping[str, Mapping[str, str]]

    @property
    def name(self) -> str:
        name: str = self.object["metadata"]["name"]
        return name

    @property
    def labels(self) -> Mapping[str, str]:
        """Of its pods."""
        labels: Mapping[str, str] = self.object["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def role(self) -> str:
        return self.labels[COMPONENT]

    @property
    def pod(self) -> Object:
        pod: Object = self.object["spec"]["template"]["spec"]
        return pod

    @property
    def container(self) -> Object:
        (only,) = self.pod["containers"]
        container: Object = only
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @cached_property
    def environment(self) -> dict[str, str]:
        """What the process finds there. A `KeyError` is a ConfigMap or a Secret that nobody makes."""
        found: dict[str, str] = {}
        for source in self.container["envFrom"]:
            found |= self.maps[source["configMapRef"]["name"]]
        fields = {"status.podIP": POD_IP, "metadata.name": f"{self.name}-0"}
        for item in self.container["env"]:
            source = item.get("valueFrom", {})
            if "fieldRef" in source:
                found[item["name"]] = fields[source["fieldRef"]["fieldPath"]]
            elif "secretKeyRef" in source:
                found[item["name"]] = SECRETS[source["secretKeyRef"]["name"], source["secretKeyRef"]["key"]]
            else:
                found[item["name"]] = item["value"]
        return found

    @property
    def image(self) -> str:
        """Its name, which is that of a target of the Dockerfile behind `spolia-`."""
        name: str = self.container["image"].partition(":")[0]
        return name

    @property
    def drain_s(self) -> float:
        return float(self.environment["SPOLIA_DRAIN_TIMEOUT_S"])

    @property
    def mounts(self) -> dict[str, Object]:
        """Mount by path."""
        return {mount["mountPath"]: mount for mount in self.container["volumeMounts"]}

    @property
    def volumes(self) -> dict[str, Object]:
        """Volume by name, claims of a StatefulSet's template among them."""
        claims = self.object["spec"].get("volumeClaimTemplates", [])
        return {volume["name"]: volume for volume in self.pod["volumes"]} | {
            claim["metadata"]["name"]: {"claim": claim["spec"]} for claim in claims
        }


@dataclass(frozen=True)
class Manifests:
    """All objects of one installation."""

    objects: tuple[Object, ...]

    def of(self, *kinds: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] in kinds]

    def named(self, kind: str, name: str) -> Object:
        (found,) = [found for found in self.of(kind) if found["metadata"]["name"] == name]
        return found

    @property
    def workloads(self) -> list[Workload]:
        maps = {found["metadata"]["name"]: found["data"] for found in self.of("ConfigMap")}
        return [Workload(found["kind"], found, maps) for found in self.of("Deployment", "StatefulSet")]

    def workload(self, role: str) -> Workload:
        (found,) = [found for found in self.workloads if found.role == role]
        return found

    def selected_by(self, selector: Mapping[str, Any]) -> set[str]:
        """Roles of the pods that a label selector finds."""
        return {found.role for found in self.workloads if selects(selector, found.labels)}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector finds labels; knows what the manifests use."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    wanted: Mapping[str, str] = selector.get("matchLabels", {})
    if any(labels.get(name) != value for name, value in wanted.items()):
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def build_command() -> list[str]:
    """What builds a kustomization; skips the test where nothing does."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    pytest.skip("neither kubectl nor kustomize is on PATH")


def build(folder: Path) -> str:
    """The objects of a kustomization as YAML."""
    done = subprocess.run([*build_command(), str(folder)], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "kustomize warns of what it will not know for long"
    return done.stdout


def write_installation(name: str, folder: Path) -> None:
    """A kustomization of a user's own, in `folder`, over those here."""
    overlay, *components = (os.path.relpath(K8S / part, folder) for part in INSTALLATIONS[name])
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [overlay],
        "components": components,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))


@cache
def manifests_in(text: str) -> Manifests:
    return Manifests(
        tuple(
            found for found in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if found is not None
        )
    )


def sources() -> Iterator[Path]:
    """Every file of manifests."""
    return (path for path in sorted(K8S.rglob("*.yaml")))


def amount(text: object) -> float:
    """A quantity in bytes, cores or pieces."""
    found = str(text)
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}
    for unit, factor in units.items():
        if found.endswith(unit):
            return float(found.removesuffix(unit)) * factor
    return float(found)
