"""Pins are leases: they hold until their time, and no longer."""

from kvstore_worlds import make_record

from spolia_kvstore.pins import Pins

KEY, OTHER = make_record(1, 1).key, make_record(2, 1).key


def test_a_pin_holds_until_its_lease_ends() -> None:
    pins = Pins()
    pins.pin(KEY, "a", until=10.0)
    assert pins.is_pinned(KEY, now=9.9)
    assert not pins.is_pinned(KEY, now=10.0)
    assert (pins.num_live(now=9.9), pins.num_live(now=10.0)) == (1, 0)


def test_leases_that_ran_out_are_forgotten_at_the_sweep_and_named() -> None:
    pins = Pins()
    for key, owner, until in ((KEY, "a", 10.0), (KEY, "b", 20.0), (OTHER, "a", 5.0)):
        pins.pin(key, owner, until)
    assert sorted(pins.sweep(now=10.0)) == [(KEY, "a"), (OTHER, "a")]
    assert (pins.sweep(now=10.0), pins.num_live(now=0.0)) == ([], 1)


def test_owners_are_told_with_what_is_left_of_their_leases() -> None:
    pins = Pins()
    for owner, until in (("a", 10.0), ("b", 20.0)):
        pins.pin(KEY, owner, until)
    assert pins.of(KEY, now=4.0) == [("a", 6.0), ("b", 16.0)]
    assert pins.of(KEY, now=15.0) == [("b", 5.0)]
    assert pins.of(OTHER, now=0.0) == []


def test_the_longest_of_several_owners_decides() -> None:
    pins = Pins()
    pins.pin(KEY, "a", until=10.0)
    pins.pin(KEY, "b", until=20.0)
    assert pins.num_live(now=0.0) == 2
    assert pins.is_pinned(KEY, now=15.0)
    assert pins.num_live(now=15.0) == 1


def test_pinning_again_renews() -> None:
    pins = Pins()
    pins.pin(KEY, "a", until=10.0)
    pins.pin(KEY, "a", until=30.0)
    assert pins.num_live(now=0.0) == 1
    assert pins.is_pinned(KEY, now=20.0)


def test_unpin_ends_the_owners_pin_only_and_says_whether_it_lived() -> None:
    pins = Pins()
    pins.pin(KEY, "a", until=10.0)
    pins.pin(KEY, "b", until=10.0)
    assert pins.unpin(KEY, "a", now=0.0)
    assert not pins.unpin(KEY, "a", now=0.0)
    assert pins.is_pinned(KEY, now=0.0)
    assert not pins.unpin(KEY, "b", now=11.0)
    assert not pins.is_pinned(KEY, now=0.0)


def test_drop_ends_every_pin_of_an_object_and_names_the_owners() -> None:
    pins = Pins()
    pins.pin(KEY, "a", until=10.0)
    assert pins.drop(KEY) == ["a"]
    assert not pins.is_pinned(KEY, now=0.0)
    assert pins.drop(KEY) == []


def test_the_pins_of_a_node_end_with_it() -> None:
    pins = Pins()
    for key, owner in ((KEY, "node-1/request"), (KEY, "node-10/request"), (OTHER, "node-1")):
        pins.pin(key, owner, until=10.0)
    assert sorted(pins.end_of_node("node-1")) == [(KEY, "node-1/request"), (OTHER, "node-1")]
    assert (pins.is_pinned(KEY, now=0.0), pins.is_pinned(OTHER, now=0.0)) == (True, False)
    assert pins.end_of_node("node-10") == [(KEY, "node-10/request")]
    assert pins.num_live(now=0.0) == 0
