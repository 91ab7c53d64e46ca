"""docs/deploy.md and docs/operate.md say what is so: sizes, metrics, names, paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import promql
from k8s_world import K8S, ROOT, build, manifests_in

from spolia_core.chunk_object import KvShape
from spolia_kvstore.config import KVStoreConfig

TEXT = (ROOT / "docs" / "deploy.md").read_text()
RUNBOOKS = (ROOT / "docs" / "operate.md").read_text()
GIB = 1 << 30
DIGEST = f"sha256:{'0' * 64}"
DTYPES = {2: "BF16", 4: "F32"}
MODEL_ROW = re.compile(r"\| (?P<model>[\w./, -]+) " + r"\| ([\d,]+) " * 7 + r"\|")


def number(text: str) -> int:
    return int(text.replace(",", ""))


def section(title: str, text: str = TEXT) -> str:
    """From its heading to the next of the same rank."""
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def sizes() -> Iterator[tuple[str, list[int]]]:
    for row in map(MODEL_ROW.fullmatch, section("Sizing").splitlines()):
        if row is not None:
            yield row["model"], [number(text) for text in row.groups()[1:]]


def test_sizes_of_tokens_are_those_of_the_shape() -> None:
    rows = list(sizes())
    assert len(rows) >= 8
    for model, (layers, heads, head_dim, dtype_bytes, kib, per_gib, longest) in rows:
        size = KvShape(layers, heads, head_dim, head_dim, DTYPES[dtype_bytes]).bytes_per_token
        assert kib * 1024 == size, model
        assert per_gib == GIB // size, model
        assert longest == KVStoreConfig().max_object_bytes // size, model


def test_the_demo_model_has_the_shape_that_is_said() -> None:
    config = json.loads((ROOT / "models" / "demo" / "config.json").read_text())
    row = dict(sizes())["models/demo, float32"]
    assert row[:3] == [config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]]


def test_runbooks_name_metrics_that_nodes_have() -> None:
    known = promql.documented()
    named = {
        name
        for title in ("Upgrade runbook", "Failure runbook")
        for name in re.findall(r"\b(spolia_[a-z0-9_]+)\b", section(title, RUNBOOKS))
    }
    assert len(named) > 15
    assert named <= set(known)


def test_every_overlay_and_component_is_described_and_no_other() -> None:
    described = section("Kubernetes")
    for overlay in (K8S / "overlays").iterdir():
        assert f"`k8s/overlays/{overlay.name}`" in described
    here = {path.name for path in (K8S / "components").iterdir()} - {"redis"}
    rows = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \| .+ \| .+ \|$", described, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row) if not name.startswith("spolia-")} == here


def test_the_kustomization_of_ones_own_builds_with_digests(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", section("Kubernetes"), re.DOTALL)
    here = tmp_path.resolve()
    overlay = os.path.relpath(K8S / "overlays" / "production", here)
    text = example.replace("../spolia/k8s/overlays/production", overlay).replace("sha256:…", DIGEST)
    (here / "kustomization.yaml").write_text(text)
    manifests = manifests_in(build(here))
    for found in manifests.workloads:
        assert found.container["image"].startswith("registry.example/spolia-")
        assert found.container["image"].endswith(f"@{DIGEST}")
        if found.role != "kvstore":
            assert found.environment["SPOLIA_MODEL_NAME"] == "my-model"


def test_files_that_commands_name_are_there() -> None:
    named = re.findall(r"\bk8s/[\w./-]*\w", TEXT)
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_secrets_that_are_described_are_those_that_are_made() -> None:
    script = (K8S / "create-secrets").read_text()
    for name in ("spolia-cluster", "spolia-keys", "spolia-redis"):
        assert f"`{name}`" in section("Kubernetes")
        assert f"secret {name} " in script
    for option in re.findall(r"--[a-z-]+", " ".join(re.findall(r"create-secrets[^`\n]*", TEXT))):
        assert f"{option})" in script or f"{option} |" in script, option
