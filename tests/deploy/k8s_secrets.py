"""What a user makes for the cluster, and the Secrets that the script makes of it."""

from __future__ import annotations

import base64
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from k8s_world import K8S, SECRETS, build_command

from spolia.local_authority import init_authority
from spolia_core.key_book import KeyBook

SCRIPT = K8S / "create-secrets"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a user has made: certificates, keys, the URL of a Redis."""
    init_authority(tmp_path / "certs", timedelta(days=1))
    (tmp_path / "keys.json").write_bytes(KeyBook().to_bytes())
    (tmp_path / "redis-url").write_text(f"{SECRETS['spolia-redis', 'url']}\n")
    return tmp_path


def made(folder: Path, *options: str) -> dict[str, dict[str, bytes]]:
    """What the script would give to the cluster: Secret to key to bytes."""
    build_command()  # skips where there is no kubectl
    arguments = ["--certs", f"{folder}/certs", "--keys", f"{folder}/keys.json", *options, "--print"]
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    secrets = [found for found in yaml.safe_load_all(done.stdout) if found is not None]
    assert {found["metadata"]["namespace"] for found in secrets} == {"spolia"}
    return {
        found["metadata"]["name"]: {key: base64.b64decode(value) for key, value in found["data"].items()}
        for found in secrets
    }
