"""Whoever connects to a node under TLS, and however many at once: it goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import handshake_crowd
import pytest
from tls_worlds import DAY, authority_in

from spolia.local_authority import renew_certificates
from spolia_node import tls
from spolia_node.certificates import LOOK_EVERY_S, NodeCertificates

NUM_ROUNDS = 1500


def test_a_certificate_is_taken_over_once_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Callable[[], Any]] = []
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda first, fetch, **_: fetched.append(fetch))
    monkeypatch.setattr(tls, "SETTLE_S", 0.0)
    folder, now, began = authority_in(tmp_path / "certs"), 0.0, []
    certificates = NodeCertificates(folder, "kvstore", lambda: now)
    tls.server_credentials(certificates, with_client_certificate=True, on_handshake=lambda: began.append(now))
    (fetch,) = fetched
    assert [fetch(), fetch()] == [None, None], "what gRPC has is what there is"
    renew_certificates(folder, DAY, roles=["kvstore"])
    now += LOOK_EVERY_S
    assert fetch() is not None
    assert [fetch(), fetch()] == [None, None]
    assert began == [0.0, 0.0, *[LOOK_EVERY_S] * 3]


def test_a_crowd_that_connects_at_once_while_the_certificate_changes_ends_no_process(tmp_path: Path) -> None:
    for name in ("one", "other"):
        authority_in(tmp_path / name)
    command = [sys.executable, handshake_crowd.__file__, str(tmp_path), str(NUM_ROUNDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > handshake_crowd.CHANGES_EVERY, "it changed meanwhile"
