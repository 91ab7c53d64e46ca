"""What a compose project makes before its first start is whole, each part for one, and stays."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from docker_files import load

from spolia.local_authority import LocalAuthority, renew_certificates
from spolia_core.errors import InvalidRequest
from spolia_core.key_book import KeyBook, Role
from spolia_core.node_name import CERTIFIED_ROLES
from spolia_node.certificates import NodeCertificates

FOLDERS = ("authority", *CERTIFIED_ROLES, "keys", "redis", "grafana")
first_start = load("first_start")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("role", CERTIFIED_ROLES)
def test_each_is_given_the_key_of_its_own_role_and_of_nobody_else(folder: Path, role: str):
    first_start.prepare(folder)
    assert {path.name for path in (folder / role).glob("*.key")} - {"api.key"} == {f"{role}.key"}
    assert NodeCertificates(folder / role, role).current().authority_pem == (folder / "authority/ca.crt").read_bytes()
    for path in (folder / role).iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_second_start_changes_nothing(folder: Path):
    assert first_start.prepare(folder) != []
    before = contents(folder)
    assert first_start.prepare(folder) == []
    assert contents(folder) == before


def test_the_first_key_is_an_operators_and_is_known_to_the_book(folder: Path):
    first_start.prepare(folder)
    key = (folder / "operator/api.key").read_text()
    book = KeyBook.from_bytes((folder / "keys/keys.json").read_bytes())
    record = book.find(key)
    assert record is not None
    assert (record.tenant_id, record.roles) == ("default", {Role.USER, Role.OPERATOR})
    assert key.encode() not in (folder / "keys/keys.json").read_bytes()


def test_certificates_that_end_soon_are_made_anew_and_the_authority_stays(folder: Path):
    first_start.prepare(folder)
    authority, before = folder / "authority", contents(folder)
    renew_certificates(authority, timedelta(days=29), ("gateway",), ["decode"])
    assert first_start.prepare(folder) == ["new certificates of decode"]
    ends = NodeCertificates(folder / "decode", "decode").current().expires_at
    assert ends > NodeCertificates(folder / "prefill", "prefill").current().expires_at - timedelta(hours=1)
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {
        f"{place}/decode.{suffix}" for place in ("authority", "decode") for suffix in ("crt", "key")
    }


def test_what_an_interruption_left_out_is_made_at_the_next_start(folder: Path):
    LocalAuthority.create(timedelta(days=3650)).save(folder / "authority")
    assert first_start.prepare(folder)[0] == f"new certificates of {', '.join(CERTIFIED_ROLES)}"
    shutil.rmtree(folder / "decode")
    (folder / "decode").mkdir()
    os.unlink(folder / "keys/keys.json")
    old_key = (folder / "operator/api.key").read_bytes()
    assert len(first_start.prepare(folder)) == 1, "a key; the volume of decode is filled again without a word"
    assert NodeCertificates(folder / "decode", "decode").current().expires_at is not None
    assert (folder / "operator/api.key").read_bytes() != old_key


def test_half_an_authority_is_no_reason_to_make_another(folder: Path):
    first_start.prepare(folder)
    os.unlink(folder / "authority/ca.key")
    os.unlink(folder / "authority/decode.crt")
    with pytest.raises(InvalidRequest):
        first_start.prepare(folder)
    assert not (folder / "authority/ca.key").exists()
