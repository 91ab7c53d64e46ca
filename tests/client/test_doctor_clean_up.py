"""What the doctor's tenants stored goes from every store, and what stays is said."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from fake_store import FakeStore

from spolia.cli.doctor import _clean_up
from spolia.doctor import clean_up as cleaning
from spolia.doctor.clean_up import clean_up
from spolia.doctor.finding import State
from spolia.doctor.isolation import Isolation
from spolia.errors import Forbidden

Stores = tuple[FakeStore, FakeStore]
OWN = ("doctor-a", "doctor-b")
NOWHERE = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "LOOK_S", 0.1)


def test_all_of_its_tenants_goes_also_what_comes_late_and_nothing_of_others(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stores
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == cleaning.NUM_EMPTY_LOOKS:  # the first look found what there was, those behind it nothing
            second.put("cc", tenant=OWN[1])

    for start in ("aa", "bb"):
        first.put(start, tenant=OWN[0])
        second.put(start, tenant="acme")
    monkeypatch.setattr(cleaning, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))
    found = clean_up([store.address for store in stores], OWN, 100, 20.0)
    assert pauses == [cleaning.LOOK_S] * (2 * cleaning.NUM_EMPTY_LOOKS + 1)
    assert (found.state, found.facts["num_objects"]) == (State.OK, 3), found
    assert not first.objects
    assert {tenant for tenant, _ in second.objects} == {"acme"}


def test_a_store_that_refuses_is_named_with_what_stays(stores: Stores) -> None:
    for store in stores:
        store.failure = Forbidden("no operator's certificate")
    found = clean_up([store.address for store in stores], OWN, 4321, 20.0)
    assert found.state is State.WARNING
    assert all(words in found.said for words in ("at most 4321 tokens", "stays in the stores", "no operator's"))


def test_a_store_that_is_away_is_named_and_the_other_is_cleaned(stores: Stores) -> None:
    stores[0].put("aa", tenant=OWN[0])
    found = clean_up([stores[0].address, NOWHERE], OWN, 100, 20.0)
    assert (found.state, found.facts["failed"]) == (State.WARNING, [NOWHERE])
    assert not stores[0].objects


def test_what_never_ends_to_come_is_given_up_and_said(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "NUM_EMPTY_LOOKS", 10_000)
    monkeypatch.setattr(cleaning, "PATIENCE_S", 0.5)
    found = clean_up([stores[0].address], OWN, 100, 20.0)
    assert found.state is State.WARNING
    assert "still came" in found.said


def test_tenants_that_are_others_are_left_alone_and_it_is_said() -> None:
    nobody: list[str] = []
    isolation = Isolation(None, None, 8, 0, nobody.append)  # type: ignore[arg-type]  # asks nobody here
    found = _clean_up(isolation, (), None, 20.0)
    assert found.state is State.SKIPPED
    assert "stays in the stores until it ages out; the tenants are not the doctor's" in found.said
