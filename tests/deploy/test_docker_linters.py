"""Nothing that linters of deployments find is unexplained. `make deploy-check` installs them and runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from docker_files import COMPOSE, COMPOSE_GPU, DOCKER, DOCKERFILE

CHECKOV, HADOLINT, DOCKER_COMPOSE = (os.environ.get(name, "") for name in ("CHECKOV", "HADOLINT", "COMPOSE"))
LIMIT_S = 570


def needs(name: str, program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not program, reason=f"{name} names no program; make deploy-check installs one")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def checkov(framework: str, folder: Path) -> dict[str, Any]:
    done = run(CHECKOV, "--framework", framework, "--output", "json", "--skip-download", "--directory", folder)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@needs("CHECKOV", CHECKOV)
def test_checkov_finds_nothing_in_the_dockerfile():
    report = checkov("dockerfile", DOCKER)
    assert [found["check_id"] for found in report["results"]["failed_checks"]] == []
    assert report["summary"]["passed"] > 100
    assert report["results"]["skipped_checks"] == []


@needs("CHECKOV", CHECKOV)
def test_checkov_would_find_an_image_that_runs_as_root(tmp_path: Path):
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root"))
    assert "CKV_DOCKER_8" in {
        found["check_id"] for found in checkov("dockerfile", tmp_path)["results"]["failed_checks"]
    }


@needs("CHECKOV", CHECKOV)
def test_checkov_finds_no_secret_in_what_is_deployed():
    assert checkov("secrets", DOCKER).get("results", {}).get("failed_checks", []) == []


@needs("HADOLINT", HADOLINT)
def test_hadolint_finds_nothing_in_the_dockerfile():
    done = run(HADOLINT, "--no-color", DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@needs("COMPOSE", DOCKER_COMPOSE)
@pytest.mark.parametrize("files", [(COMPOSE,), (COMPOSE, COMPOSE_GPU)], ids=["cpu", "gpu"])
def test_docker_compose_itself_reads_the_files_with_every_profile(files: tuple[Path, ...]):
    named = [word for path in files for word in ("-f", path)]
    done = run(DOCKER_COMPOSE, *named, "--profile", "*", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert len(services) == 10
    assert services["decode"]["deploy"]["replicas"] == (1 if COMPOSE_GPU in files else 2)
    assert {service: given["build"]["target"] for service, given in services.items() if "build" in given}.keys() == {
        *("setup", "gateway", "prefill", "decode", "kvstore", "kvstore-2"),
    }
