"""What cannot be sent is refused here, by the name of the field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from fake_gateway import FakeGateway

from spolia import AsyncClient, Client, Document, InvalidRequest, TokenIds
from spolia.argument_checks import MAX_TIMEOUT_S

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
        ({"json_schema": "{"}, "sampling.json_schema"),
        ({"json_schema": {"const": {1}}}, "sampling.json_schema"),
        ({"regex": ""}, "sampling.regex"),
        ({"choices": []}, "sampling.choices"),
        ({"choices": ["a", "a"]}, "sampling.choices"),
        ({"lark": LONE_SURROGATE}, "sampling.lark"),
        ({"regex": "a", "json_object": True}, "sampling.regex"),
        ({"regex": "a", "ignore_eos": True}, "sampling.ignore_eos"),
        ({"request_id": "é"}, "request_id"),
        ({"request_id": "a\nb"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": math.inf}, "timeout_s"),
        ({"timeout_s": MAX_TIMEOUT_S * 1.01}, "timeout_s"),
        ({"timeout_s": 1e10}, "timeout_s"),
        ({"timeout_s": 10**400}, "timeout_s"),
    ],
)
def test_an_option_that_cannot_be_served_is_refused_by_name(
    options: Any, field: str, client: Client, gateway: FakeGateway
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("Hi", **options)
    assert caught.value.field == field
    assert gateway.requests == []


def wrong_options() -> list[Any]:
    wrong: dict[str, tuple[str, list[Any]]] = {
        "sampling.stop": ("stop", [None, 5, [b"x"], b"x", {"a": 1}]),
        "sampling.max_tokens": ("max_tokens", [1.5, "3", True]),
        "sampling.temperature": ("temperature", ["x", None, True, [1.0]]),
        "sampling.top_p": ("top_p", ["1", None, False]),
        "sampling.top_k": ("top_k", [1.5, None, "1", True]),
        "sampling.seed": ("seed", [1.5, "a", True]),
        "sampling.ignore_eos": ("ignore_eos", ["yes", 1, None]),
        "sampling.json_schema": ("json_schema", [5, b"{}", [], True]),
        "sampling.json_object": ("json_object", ["yes", 1, None]),
        "sampling.regex": ("regex", [5, b"a", ["a"]]),
        "sampling.choices": ("choices", ["yes", 5, [b"x"], {"a": 1}]),
        "sampling.lark": ("lark", [5, b"a"]),
        "force_linked": ("force_linked", ["yes", 1]),
        "no_bos": ("no_bos", ["no", 0]),
        "cache_salt": ("cache_salt", [None, 5, b"x"]),
        "mode": ("mode", [None, 5, b"exact"]),
        "splitting.splitter": ("splitter", [5, b"sentence", "chapter", ""]),
        "splitting.max_tokens": ("split_max_tokens", [1.5, "64", True, 0, 31, 65537, -1]),
        "request_id": ("request_id", [5, b"a", None]),
        "timeout_s": ("timeout_s", ["3", b"3", True, [3]]),
    }
    return [
        pytest.param("Hi", {name: value}, field, id=f"{name}={value!r}")
        for field, (name, values) in wrong.items()
        for value in values
    ]


@pytest.mark.parametrize(
    ("parts", "options", "field"),
    [
        *(
            pytest.param(parts, {}, "parts", id=f"parts={parts!r}")
            for parts in (None, 5, b"abc", bytearray(b"abc"), {"text": 1}, 1.5)
        ),
        ([None], {}, "parts[0]"),
        ([b"abc"], {}, "parts[0]"),
        ([["a"]], {}, "parts[0]"),
        (TokenIds(["a"]), {}, "parts[0].token_ids"),  # type: ignore[list-item]  # wrong on purpose
        (TokenIds([1, 1.5]), {}, "parts[0].token_ids"),  # type: ignore[list-item]  # wrong on purpose
        (["a", TokenIds([True])], {}, "parts[1].token_ids"),
        (Document(5), {}, "parts[0].document.text"),  # type: ignore[arg-type]  # wrong on purpose
        (Document(b"a"), {}, "parts[0].document.text"),  # type: ignore[arg-type]  # wrong on purpose
        (Document("a", name=None), {}, "parts[0].document.name"),  # type: ignore[arg-type]  # wrong on purpose
        *wrong_options(),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused_by_name(
    parts: Any, options: Any, field: str, client: Client, gateway: FakeGateway
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate(parts, **options)
    assert caught.value.field == field
    assert field in caught.value.message
    assert caught.value.limit
    assert caught.value.actual
    assert gateway.requests == []


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TokenIds(5), "token_ids"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: TokenIds("12"), "token_ids"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: Client(None), "address"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: Client(model=5), "model"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: Client(timeout_s="3"), "timeout_s"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: Client(timeout_s=9.3e9), "timeout_s"),
        (lambda: Client(max_message_bytes="1"), "max_message_bytes"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: AsyncClient(timeout_s=None), "timeout_s"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: Client().tokenize(5), "text"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: Client().warm(None), "documents"),  # type: ignore[arg-type]  # wrong on purpose
        (lambda: Client().forget(b"abc"), "documents"),  # type: ignore[arg-type]  # wrong on purpose
    ],
)
def test_so_is_one_of_any_other_call(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make()
    assert caught.value.field == field
    assert field in caught.value.message


class Two:
    """Counts as an int, as a number of numpy does."""

    def __index__(self) -> int:
        return 2


def test_what_counts_as_an_int_is_taken_as_one(gateway: FakeGateway) -> None:
    with Client(gateway.address) as client:
        client.generate(TokenIds([Two()]), max_tokens=Two(), seed=Two(), temperature=1, timeout_s=30)  # type: ignore[list-item, arg-type]  # it is an index, which is as good as an int
    (request,) = gateway.requests
    assert list(request.parts[0].token_ids.ids) == [2]
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.temperature) == (2, 2, 1.0)


def test_the_longest_time_limit_is_not_over_at_once(gateway: FakeGateway) -> None:
    with Client(gateway.address, timeout_s=MAX_TIMEOUT_S) as client:
        assert client.generate("Hi").text == "Héllo"


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_an_unknown_option_is_named_with_the_method_that_was_called(kind: Any, method: str) -> None:
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\.{method}\(\) got an unexpected keyword argument 'top_q'$"):
        await getattr(kind(), method)("Hi", top_q=1)


@pytest.mark.parametrize(
    ("documents", "field"),
    [([], "documents"), (["a", ""], "documents[1].text"), ([b"a"], "documents[0]"), ("x" * 1001, "documents")],
)
def test_a_document_that_cannot_be_sent_is_refused_by_name(documents: Any, field: str, client: Client) -> None:
    for method in (client.warm, client.forget):
        with pytest.raises(InvalidRequest) as caught:
            method(documents)
        assert caught.value.field == field


@pytest.mark.parametrize("salt", [None, 5, LONE_SURROGATE])
def test_a_salt_that_cannot_be_sent_is_refused_by_name(salt: Any, client: Client, gateway: FakeGateway) -> None:
    for method in (client.warm, client.forget):
        with pytest.raises(InvalidRequest) as caught:
            method("a", cache_salt=salt)
        assert caught.value.field == "cache_salt"
    assert gateway.requests == []


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
