"""Replicas and claims under random operations, against dicts."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from backend_worlds import HERE, TENANT, THERE, a_key, a_replica, eventually
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis_server import RedisServer

from spolia_kvstore.backend import Backend, ClaimAnswer, ClaimLease
from spolia_kvstore.catalog import Catalog
from spolia_kvstore.embedded_backend import EmbeddedBackend
from spolia_kvstore.objects import ObjectKey, Tier
from spolia_kvstore.redis_backend import RedisBackend

KEYS = [a_key(number) for number in range(3)]
OWNERS = ["a", "b"]
LONG_S = 600.0

some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True)
owners = st.sampled_from(OWNERS)
tiers = st.sampled_from(Tier)


class BackendMachine(RuleBasedStateMachine):
    """What `make_backend` makes does what dicts do. One alone has one store."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.catalog = Catalog()
        self.backend: Backend = RedisBackend(self.url, uuid4().hex, timeout_s=20.0) if self.url else self.embedded()
        self.stores = [HERE, THERE] if self.backend.is_shared else [HERE]
        self.replicas: set[tuple[ObjectKey, Tier, str]] = set()
        self.claims: dict[ObjectKey, str] = {}
        self.run(self.backend.start())
        self.run(eventually(lambda: self.backend.reachable))

    def embedded(self) -> Backend:
        return EmbeddedBackend(self.catalog)

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        self.run(self.backend.close())
        self.catalog.close()
        self.runner.close()

    @rule(keys=some_keys, tier=tiers, data=st.data())
    def publish(self, keys: list[ObjectKey], tier: Tier, data: st.DataObject) -> None:
        store_id = data.draw(st.sampled_from(self.stores))
        self.run(self.backend.publish([a_replica(key, tier, store_id) for key in keys]))
        for key in keys:
            self.replicas.add((key, tier, store_id))
            self.claims.pop(key, None)

    @rule(keys=some_keys, tier=tiers, data=st.data())
    def withdraw(self, keys: list[ObjectKey], tier: Tier, data: st.DataObject) -> None:
        store_id = data.draw(st.sampled_from(self.stores))
        self.run(self.backend.withdraw(store_id, keys, tier))
        self.replicas -= {(key, tier, store_id) for key in keys}

    @rule(keys=some_keys, owner=owners, data=st.data())
    def claim(self, keys: list[ObjectKey], owner: str, data: st.DataObject) -> None:
        live = data.draw(st.sets(st.sampled_from(self.stores))) if self.backend.is_shared else set(self.stores)
        answers = self.run(self.backend.claim(keys, owner, LONG_S, live))
        for key, answer in zip(keys, answers, strict=True):
            if self.at(key, live):
                assert answer == ClaimAnswer(is_stored=True)
            else:
                assert answer.lease.owner == self.claims.setdefault(key, owner)

    @rule(keys=some_keys, owner=st.none() | owners)
    def unclaim(self, keys: list[ObjectKey], owner: str | None) -> None:
        standing = [self.claims.get(key) for key in keys]
        ended = [holder is not None and owner in (None, holder) for holder in standing]
        assert self.run(self.backend.unclaim(keys, owner)) == ended
        for key, has_ended in zip(keys, ended, strict=True):
            if has_ended:
                del self.claims[key]

    @invariant()
    def all_is_as_in_the_dicts(self) -> None:
        found = self.run(self.backend.locate(TENANT, [key.chunk_id for key in KEYS], self.stores))
        assert found == {key.chunk_id: self.at(key, self.stores) for key in KEYS if self.at(key, self.stores)}
        leases: list[ClaimLease | None] = self.run(self.backend.claims(KEYS))
        assert [lease and lease.owner for lease in leases] == [self.claims.get(key) for key in KEYS]

    def at(self, key: ObjectKey, live: Collection[str]) -> list[Any]:
        places = sorted((tier, store) for name, tier, store in self.replicas if name == key and store in live)
        return [a_replica(key, tier, store) for tier, store in places]


@pytest.mark.parametrize("kind", ["sqlite", "redis", "redis+cluster"])
def test_a_backend_does_what_dicts_do(kind: str, tmp_path: Path) -> None:
    few = settings(max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
    if kind == "sqlite":
        run_state_machine_as_test(BackendMachine, settings=few)
        return
    with RedisServer(tmp_path, cluster=kind == "redis+cluster") as server:
        machine = type("RedisMachine", (BackendMachine,), {"url": server.url})
        run_state_machine_as_test(machine, settings=few)
