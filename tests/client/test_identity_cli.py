"""`spolia keys` and `spolia certs`, and how a client takes what they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spolia.cli.app import run
from spolia.client import Client
from spolia.connection import open_door
from spolia.errors import InvalidRequest
from spolia.operator_tls import store_channel
from spolia_core.key_book import KeyBook, Role


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPOLIA_API_KEY", "SPOLIA_CA_FILE", "SPOLIA_TLS_DIR", "SPOLIA_KEYS", "SPOLIA_ALLOW_PLAINTEXT"):
        monkeypatch.delenv(name, raising=False)


def outcome(*argv: str) -> int:
    try:
        return run(argv)
    except SystemExit as ended:
        return int(ended.code or 0)


def test_a_key_is_made_shown_once_listed_and_withdrawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    at = ("--keys", str(path))
    assert outcome("keys", "create", *at, "--tenant", "acme", "--name", "Ursel", "--days", "30") == 0
    key = capsys.readouterr().out.strip()
    assert outcome("keys", "create", *at, "--tenant", "shared", "--operator", "--json") == 0
    operators = json.loads(capsys.readouterr().out)
    book = KeyBook.from_bytes(path.read_bytes())
    record = book.find(key)
    assert record is not None
    assert (record.tenant_id, record.name, record.roles) == ("acme", "Ursel", {Role.USER})
    found = book.find(operators["key"])
    assert found is not None
    assert Role.OPERATOR in found.roles
    assert outcome("keys", "limit", *at, "--tenant", "acme", "--requests", "3") == 0
    capsys.readouterr()
    assert outcome("keys", "limit", *at, "--tenant", "acme", "--cache-bytes", "9") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["acme", "3", "none", "9"]
    assert outcome("keys", "list", *at, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["tenant"] for one in listed["keys"]].count("acme") == 1
    assert listed["tenants"]["acme"] == {"max_requests": 3, "max_tokens": 0, "max_cache_bytes": 9}
    assert outcome("keys", "list", *at) == 0
    shown = capsys.readouterr().out
    assert record.key_id in shown
    assert key not in shown
    assert outcome("keys", "revoke", *at, record.key_id) == 0
    assert KeyBook.from_bytes(path.read_bytes()).find(key) is None
    assert outcome("keys", "revoke", *at, record.key_id) == 1
    assert "there is no key" in capsys.readouterr().err


def test_a_key_of_the_shared_tenant_is_an_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    assert outcome("keys", "create", "--keys", str(path), "--tenant", "shared") == 2
    assert "operator" in capsys.readouterr().err
    assert not path.exists()


def test_certificates_are_made_once_and_renewed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "certs"
    assert outcome("certs", "init", str(folder), "--host", "gateway.example") == 0
    before = (
        (folder / "ca.crt").read_bytes(),
        (folder / "decode.crt").read_bytes(),
        (folder / "kvstore.crt").read_bytes(),
    )
    assert outcome("certs", "init", str(folder)) == 2
    assert "certs renew" in capsys.readouterr().err
    assert outcome("certs", "renew", str(folder), "--role", "decode") == 0
    after = (
        (folder / "ca.crt").read_bytes(),
        (folder / "decode.crt").read_bytes(),
        (folder / "kvstore.crt").read_bytes(),
    )
    assert (before[0], before[2]) == (after[0], after[2])
    assert before[1] != after[1]
    assert outcome("certs", "renew", str(folder), "--role", "root") == 2
    assert outcome("certs", "renew", str(tmp_path / "nothing")) == 2


def test_a_client_is_under_tls_outside_loopback_unless_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_door("127.0.0.1:7300", None, None, None).plaintext
    assert not open_door("gateway:7300", None, None, None).plaintext
    assert open_door("gateway:7300", None, None, True).plaintext
    monkeypatch.setenv("SPOLIA_ALLOW_PLAINTEXT", "1")
    assert open_door("gateway:7300", None, None, None).plaintext
    assert not open_door("gateway:7300", None, None, False).plaintext
    assert outcome("certs", "init", str(tmp_path / "certs")) == 0
    monkeypatch.setenv("SPOLIA_TLS_DIR", str(tmp_path / "certs"))
    local = open_door("127.0.0.1:7300", None, None, None)
    assert not local.plaintext
    assert local.authority_pem == (tmp_path / "certs" / "ca.crt").read_bytes()


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOLIA_API_KEY", "sk-spolia-environment")
    with Client(api_key="sk-spolia-given") as client:
        outgoing = client._requests.tokenize("stones")
        assert ("authorization", "Bearer sk-spolia-given") in outgoing.metadata
        assert "sk-spolia" not in repr(outgoing) + repr(client._requests)
    with Client() as client:
        assert ("authorization", "Bearer sk-spolia-environment") in client._requests.tokenize("stones").metadata
    assert "sk-spolia" not in repr(open_door("127.0.0.1:1", "sk-spolia-given", None, None))
    with pytest.raises(InvalidRequest, match="api_key"):
        Client(api_key="sk\nspolia")
    with pytest.raises(InvalidRequest, match="ca_file"):
        Client(ca_file="/nowhere/ca.crt")


def test_an_operators_tools_need_a_certificate_outside_loopback(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="tls_dir") as caught:
        store_channel("store:7301")
    assert caught.value.field == "tls_dir"
    with pytest.raises(InvalidRequest, match="cannot be read"):
        store_channel("store:7301", tmp_path)
    store_channel("127.0.0.1:1").close()
