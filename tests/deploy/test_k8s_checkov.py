"""checkov finds nothing that is not explained where it stands. `make deploy-check` runs this."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_world import K8S

CHECKOV = os.environ.get("CHECKOV", "")
MIN_REASON_CHARS = 40

pytestmark = pytest.mark.skipif(not CHECKOV, reason="CHECKOV names no program; make deploy-check installs one")


def report_on(folder: Path) -> dict[str, Any]:
    command = [CHECKOV, "--framework", "kubernetes", "--output", "json", "--skip-download", "--directory", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_checkov_finds_is_explained(built: Mapping[str, str], tmp_path: Path) -> None:
    for name, text in built.items():
        (tmp_path / f"{name.replace(' ', '-')}.yaml").write_text(text)
    loader = (K8S / "overlays" / "gpu" / "model-loader.yaml").read_text()
    (tmp_path / "model-loader.yaml").write_text(loader)
    report = report_on(tmp_path)
    failed = [
        f"{each['check_id']} {each['check_name']}: {each['resource']}" for each in report["results"]["failed_checks"]
    ]
    assert failed == []
    assert report["summary"]["passed"] > 1000
    assert report["summary"]["parsing_errors"] == 0
    for each in report["results"]["skipped_checks"]:
        assert len(each["check_result"]["suppress_comment"]) >= MIN_REASON_CHARS


def test_checkov_would_find_a_root_container(tmp_path: Path) -> None:
    loader = yaml.safe_load((K8S / "overlays" / "gpu" / "model-loader.yaml").read_text())
    del loader["spec"]["securityContext"]
    (tmp_path / "root.yaml").write_text(yaml.safe_dump(loader))
    assert "CKV_K8S_23" in {each["check_id"] for each in report_on(tmp_path)["results"]["failed_checks"]}
