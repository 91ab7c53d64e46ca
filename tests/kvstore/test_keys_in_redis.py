"""API keys in a real Redis, and what stores take from them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import RedisServer

from spolia_core.errors import InvalidRequest, Unavailable
from spolia_core.key_book import KeyBook, TenantLimits, new_key
from spolia_core.key_place import KeyPlace, key_place
from spolia_kvstore.quotas import Quota, Tenants, quotas_in
from spolia_node.key_watch import KeyWatch
from spolia_node.metrics import Metrics


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def place(redis: RedisServer) -> KeyPlace:
    return key_place(f"{redis.url}#test:keys")


def test_what_was_never_written_is_an_empty_book(place: KeyPlace) -> None:
    assert KeyBook.from_bytes(place.read()) == KeyBook()


def test_changes_at_once_are_all_kept(place: KeyPlace) -> None:
    threads = [
        threading.Thread(target=lambda: place.change(lambda book: book.with_key(new_key("acme")[1]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(KeyBook.from_bytes(place.read()).keys) == 4


async def test_a_redis_that_goes_away_leaves_the_keys_as_they_are(redis: RedisServer, place: KeyPlace) -> None:
    key, record = new_key("acme")
    place.change(lambda book: book.with_key(record))
    metrics = Metrics()
    watch = KeyWatch(place, metrics)
    redis.kill()
    await watch.look()
    assert watch.book.find(key) == record
    assert metrics.value("spolia_key_book_reads_total", outcome="failed") == 1
    with pytest.raises(Unavailable, match="cannot be reached"):
        KeyWatch(place, metrics)


def test_no_password_is_in_a_places_name_or_errors() -> None:
    place = key_place("redis://:s3cret@127.0.0.1:1/0")
    with pytest.raises(Unavailable) as caught:
        place.read()
    assert "s3cret" not in place.name + str(caught.value)
    with pytest.raises(InvalidRequest, match="no URL of a Redis"):
        key_place("redis://:s3cret@127.0.0.1:x/0")


def test_limits_of_tenants_are_quotas_and_a_stores_own_go_before_them() -> None:
    book = KeyBook(limits={"a": TenantLimits(max_cache_bytes=10), "b": TenantLimits(max_requests=1)})
    tenants = Tenants(Quota(num_bytes=99))
    tenants.set_quotas(quotas_in(book) | {"c": Quota(num_bytes=5)})
    assert [tenants.quota(name).num_bytes for name in "abcd"] == [10, 99, 5, 99]
    tenants.set_quotas(quotas_in(book) | {"a": Quota(num_bytes=7)})
    assert tenants.quota("a").num_bytes == 7
