"""Pods without Kubernetes: real processes with the commands, the environment and the Secrets of the manifests.

Only what a machine has one of is changed: paths of mounts, ports, and the address.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from k8s_secrets import made
from k8s_world import ROOT, Manifests, Workload, manifests_in

from spolia_bench.free_port import free_port

WITHIN_S = 60.0
SERVING, NOT = 0, 1


@dataclass(frozen=True)
class Pod:
    """A running node; `environment` is its own, and its probes'."""

    workload: Workload
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]

    def probe(self, kind: str) -> int:
        """The exit code of a probe, run as the kubelet would."""
        python, *arguments = self.workload.container[kind]["exec"]["command"]
        assert python == "python"
        done = subprocess.run([sys.executable, *arguments], env=self.environment, capture_output=True, timeout=WITHIN_S)
        return done.returncode

    def wait_until(self, kind: str, expected: int) -> None:
        deadline = time.monotonic() + WITHIN_S
        while self.probe(kind) != expected:
            assert self.process.poll() is None, "the node has ended"
            assert time.monotonic() < deadline, f"{kind} is not {expected}"


@contextmanager
def running(workload: Workload, mounts: Mapping[str, Path], **changed: str) -> Iterator[Pod]:
    """`mounts`: what stands here for a path of the pod. `changed`: settings, without SPOLIA_."""
    given = {f"SPOLIA_{name}": value for name, value in changed.items()}
    environment = {name: moved(value, mounts) for name, value in workload.environment.items()}
    environment |= {"PATH": os.environ["PATH"], **given}
    python, *arguments = workload.container["command"]
    assert python == "python"
    process = subprocess.Popen([sys.executable, *arguments], env=environment)
    try:
        yield Pod(workload, environment, process)
    finally:
        process.kill()
        process.wait()


def moved(value: str, mounts: Mapping[str, Path]) -> str:
    for path, here in mounts.items():
        if value == path or value.startswith(f"{path}/"):
            return f"{here}{value.removeprefix(path)}"
    return value


def written(secret: Mapping[str, bytes], here: Path) -> Path:
    """A Secret as it is mounted."""
    here.mkdir()
    for key, content in secret.items():
        (here / key).write_bytes(content)
    return here


@pytest.fixture
def demo(built: Mapping[str, str]) -> Manifests:
    return manifests_in(built["cpu-demo"])


def test_probes_tell_apart_who_serves_who_waits_and_who_is_gone(demo: Manifests, folder: Path) -> None:
    secrets = made(folder)
    mounts = {
        "/keys": written(secrets["spolia-keys"], folder / "keys"),
        "/tmp": folder / "tmp",
        "/data": folder / "data",
    }
    mounts["/model"] = ROOT / "models" / "demo"
    address = f"127.0.0.1:{(port := free_port())}"
    common = {"HOST": "127.0.0.1", "METRICS_PORT": "0", "ADVERTISE_HOST": "127.0.0.1"}
    with ExitStack() as stack:
        certs = {"/certs": written(secrets["spolia-kvstore-tls"], folder / "of-kvstore")}
        store = stack.enter_context(running(demo.workload("kvstore"), mounts | certs, PORT=str(port), **common))
        certs = {"/certs": written(secrets["spolia-gateway-tls"], folder / "of-gateway")}
        gateway = stack.enter_context(
            running(
                demo.workload("gateway"),
                mounts | certs,
                PORT=str(free_port()),
                HTTP_PORT="0",
                DIRECTORY=address,
                **common,
            )
        )
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            store.wait_until(kind, SERVING)
        gateway.wait_until("startupProbe", SERVING)
        assert gateway.probe("livenessProbe") == SERVING, "it lives without a decode node"
        assert gateway.probe("readinessProbe") == NOT, "and is not ready"
        for pod in (gateway, store):
            pod.process.send_signal(signal.SIGTERM)
            assert pod.process.wait(pod.workload.pod["terminationGracePeriodSeconds"]) == 0
            assert pod.probe("livenessProbe") == NOT
