"""What a book of API keys holds, and what it refuses to read."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia_core.errors import InvalidRequest, NotFound
from spolia_core.key_book import KEY_PREFIX, KeyBook, Role, TenantLimits, hash_of, new_key
from spolia_core.key_file import KeyFile
from spolia_core.key_place import key_place

OPERATOR = frozenset({Role.OPERATOR})


def test_a_key_is_found_by_itself_alone_and_is_not_in_the_book() -> None:
    key, record = new_key("acme")
    book = KeyBook().with_key(record)
    assert key.startswith(KEY_PREFIX)
    assert len(key) >= len(KEY_PREFIX) + 43  # 256 bits
    assert book.find(key) == record
    for other in ("", key[:-1], key + " ", key.upper(), record.sha256, record.key_id, "x" * 10_000, "\ud800"):
        assert book.find(other) is None
    assert key.encode() not in book.to_bytes()


def test_no_two_keys_are_alike() -> None:
    assert len({new_key("acme")[0] for _ in range(200)}) == 200


tenants = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20).filter(
    lambda name: name != "shared"
)
limits = st.builds(TenantLimits, *[st.integers(0, 2**63 - 1)] * 3)


@settings(derandomize=True, deadline=None, max_examples=50, database=None)
@given(
    st.lists(st.tuples(tenants, st.sets(st.sampled_from(Role), min_size=1), st.booleans()), max_size=4),
    st.dictionaries(tenants, limits, max_size=3),
)
def test_what_is_written_is_read_again(keys: list[Any], bounds: dict[str, TenantLimits]) -> None:
    book = KeyBook(limits=bounds)
    for tenant_id, roles, ends in keys:
        expires_at = datetime(2030, 1, 1, tzinfo=UTC) if ends else None
        book = book.with_key(new_key(tenant_id, frozenset(roles), expires_at=expires_at, name="Ursel")[1])
    assert KeyBook.from_bytes(book.to_bytes()) == book
    assert KeyBook.from_bytes(book.to_bytes()).to_bytes() == book.to_bytes()


def test_only_operators_have_keys_of_the_shared_tenant() -> None:
    with pytest.raises(InvalidRequest, match="operator"):
        new_key("shared")
    assert new_key("shared", OPERATOR)[1].tenant_id == "shared"
    table = json.loads(KeyBook().with_key(new_key("shared", OPERATOR)[1]).to_bytes())
    table["keys"][0]["roles"] = ["user"]
    with pytest.raises(InvalidRequest, match=r"keys\[0\].roles"):
        KeyBook.from_bytes(json.dumps(table).encode())


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("sha256", "12", r"keys\[0\].sha256"),
        ("sha256", "A" * 64, r"keys\[0\].sha256"),
        ("tenant", "", r"keys\[0\].tenant"),
        ("tenant", "a\n", r"keys\[0\].tenant"),
        ("tenant", 7, r"keys\[0\].tenant"),
        ("roles", [], r"keys\[0\].roles"),
        ("roles", ["root"], r"keys\[0\].roles"),
        ("roles", "user", r"keys\[0\].roles"),
        ("created_at", "yesterday", r"keys\[0\].created_at"),
        ("expires_at", "2030-01-01T00:00:00", r"keys\[0\].expires_at"),
        ("id", "", r"keys\[0\].id"),
        ("name", "a\nb", r"keys\[0\].name"),
        ("secret", "x", r"keys\[0\] must be made of"),
    ],
)
def test_a_wrong_field_of_a_key_is_named(field: str, value: object, named: str) -> None:
    table = json.loads(KeyBook().with_key(new_key("acme")[1]).to_bytes())
    table["keys"][0][field] = value
    with pytest.raises(InvalidRequest, match=named):
        KeyBook.from_bytes(json.dumps(table).encode())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "one JSON object"),
        (b'{"format": 2}', "format"),
        (b'{"format": 1, "key": []}', "made of"),
        (b'{"format": 1, "keys": {}}', "keys must be a list"),
        (b'{"format": 1, "tenants": {"a": {"max_requests": -1}}}', "tenants.a.max_requests"),
        (b'{"format": 1, "tenants": {"a": {"max_requests": true}}}', "tenants.a.max_requests"),
        (b'{"format": 1, "tenants": {"a": {"max_request": 1}}}', "tenants.a must be made of"),
        (b'{"format": 1, "tenants": {"": {}}}', "tenants. must be"),
    ],
)
def test_wrong_content_is_named(content: bytes, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        KeyBook.from_bytes(content)


def test_the_same_key_twice_is_refused() -> None:
    table = json.loads(KeyBook().with_key(new_key("acme")[1]).to_bytes())
    table["keys"].append({**table["keys"][0], "id": "key-other"})
    with pytest.raises(InvalidRequest, match="without repetition"):
        KeyBook.from_bytes(json.dumps(table).encode())


def test_a_key_that_is_not_there_cannot_be_withdrawn() -> None:
    with pytest.raises(NotFound, match="key-0"):
        KeyBook().without_key("key-0")


def test_a_hash_is_the_whole_keys() -> None:
    assert hash_of("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # FIPS 180-4


def test_a_new_file_is_its_owners_alone_and_keeps_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key_place(str(path)).change(lambda book: book.with_key(new_key("acme")[1]))
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    key_place(str(path)).change(lambda book: book.with_key(new_key("acme")[1]))
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(KeyBook.from_bytes(path.read_bytes()).keys) == 2


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    place = KeyFile(tmp_path / "keys.json")
    threads = [
        threading.Thread(target=lambda: place.change(lambda book: book.with_key(new_key("acme")[1]))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(KeyBook.from_bytes(place.read()).keys) == 8


def test_a_change_that_fails_changes_nothing(tmp_path: Path) -> None:
    place = KeyFile(tmp_path / "keys.json")
    place.change(lambda book: book.with_key(new_key("acme")[1]))
    before = place.read()
    with pytest.raises(NotFound):
        place.change(lambda book: book.without_key("key-0"))
    assert place.read() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="keys must be"):
        key_place("")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        key_place(str(tmp_path / "none.json")).read()
    with pytest.raises(InvalidRequest, match="cannot be written"):
        key_place(str(tmp_path / "none" / "keys.json")).change(lambda book: book)
