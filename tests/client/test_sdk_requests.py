"""What cannot be sent is refused here, by the name of the field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_gateway import FakeGateway

from spolia import Client, Document, InvalidRequest, TokenIds

LONE_SURROGATE = "caf\ud800"


@pytest.fixture
def client(gateway: FakeGateway) -> Client:
    return Client(gateway.address, max_message_bytes=1000)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([], "parts"),
        ("", "parts[0].text"),
        (["a", Document("")], "parts[1].document.text"),
        (["a", TokenIds([])], "parts[1].token_ids"),
        (TokenIds([0, -1]), "parts[0].token_ids"),
        (TokenIds([2**32]), "parts[0].token_ids"),
        (LONE_SURROGATE, "parts[0].text"),
        (Document(LONE_SURROGATE), "parts[0].document.text"),
        (Document("a", name=LONE_SURROGATE), "parts[0].document.name"),
        (["a", 5], "parts[1]"),
        ("x" * 1001, "parts"),
    ],
)
def test_a_part_that_cannot_be_sent_is_refused_by_name(
    parts: Any, field: str, client: Client, gateway: FakeGateway
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(parts)
    assert caught.value.field == field
    assert caught.value.limit
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "fast"}, "mode"),
        ({"max_tokens": 0}, "sampling.max_tokens"),
        ({"max_tokens": 2**32}, "sampling.max_tokens"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_k": 2**32}, "sampling.top_k"),
        ({"seed": -1}, "sampling.seed"),
        ({"seed": 2**64}, "sampling.seed"),
        ({"stop": ""}, "sampling.stop"),
        ({"stop": [LONE_SURROGATE]}, "sampling.stop"),
        ({"request_id": "é"}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": math.inf}, "timeout_s"),
    ],
)
def test_an_option_that_cannot_be_served_is_refused_by_name(
    options: Any, field: str, client: Client, gateway: FakeGateway
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("Hi", **options)
    assert caught.value.field == field
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("documents", "field"),
    [([], "documents"), (["a", ""], "documents[1].text"), ([b"a"], "documents[0]"), ("x" * 1001, "documents")],
)
def test_a_document_that_cannot_be_sent_is_refused_by_name(documents: Any, field: str, client: Client) -> None:
    for method in (client.warm, client.forget):
        with pytest.raises(InvalidRequest) as caught:
            method(documents)
        assert caught.value.field == field


@pytest.mark.parametrize("address", ["", "localhost", "host:", ":7300", "host:70000", "http://host:7300", "host:0"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client(address)
    assert caught.value.field == "address"


def test_a_request_at_the_limit_of_a_message_is_sent(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        client.generate("x" * 100)
        size = gateway.requests[0].ByteSize()
    with Client(gateway.address, max_message_bytes=size) as client:
        client.generate("x" * 100)
        with pytest.raises(InvalidRequest):
            client.generate("x" * 101)
