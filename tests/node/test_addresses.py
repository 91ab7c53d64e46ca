"""Addresses: what peers can be told to connect to, and nothing else."""

from __future__ import annotations

import pytest

from spolia_node.addresses import addresses_in, is_address


@pytest.mark.parametrize("text", ["localhost:1", "store-1.example:50051", "10.0.0.7:65535", "[::1]:8080"])
def test_a_host_and_a_port_are_an_address(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:",
        ":1",
        "[]:1",
        "::1:8080",
        "host:0",
        "host:65536",
        "host:+1",
        "host: 1",
        "host:²",
        "host:٣",
        "http://host:1",
        "user@host:1",
        "two hosts:1",
        "host\n:1",
    ],
)
def test_anything_else_is_none(text: str) -> None:
    assert not is_address(text)


def test_a_list_is_cut_at_its_commas() -> None:
    assert addresses_in("a:1, b:2") == ("a:1", "b:2")
    assert addresses_in("") == ()
