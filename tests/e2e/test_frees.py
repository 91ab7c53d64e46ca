"""Whatever a client does, nothing is held afterwards."""

from __future__ import annotations

import pytest
from e2e_world import ledgers_are_empty, prompts, wait_until

from spolia import Client, DeadlineExceeded, Document, InvalidRequest, NotFound, TokenIds


def test_dropped_streams_free_every_node(client: Client) -> None:
    documents = [Document(text) for text in prompts(5, seed=21)]
    for mode in ("exact", "linked"):
        for stop_after in (0, 1, 30):
            with client.stream(
                [*documents, f"{mode} {stop_after}?"], mode=mode, max_tokens=500, ignore_eos=True
            ) as stream:
                for count, _ in enumerate(stream):
                    if count >= stop_after:
                        break
    wait_until("every ledger is empty", lambda: ledgers_are_empty(client))


def test_expired_deadlines_free_every_node(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate("Once there was", max_tokens=4000, ignore_eos=True, timeout_s=1.0)
    wait_until("every ledger is empty", lambda: ledgers_are_empty(client))


def test_bad_input_is_refused_before_memory_is_held(client: Client) -> None:
    limits = client.models()[0]
    too_long = tuple([5] * limits.max_context_tokens)
    for parts, options, field in (
        ([TokenIds((limits.vocab_size,))], {}, "parts[0].token_ids"),
        ([TokenIds(too_long)], {}, "parts"),
        (["text"], {"temperature": -1.0}, "sampling.temperature"),
        (["text"], {"top_p": 0.0}, "sampling.top_p"),
        (["text"], {"max_tokens": 0}, "sampling.max_tokens"),
        (["text"], {"stop": [""]}, "sampling.stop"),
        ([], {}, "parts"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            client.generate(parts, **options)
        assert caught.value.field.startswith(field.split("[")[0]), (field, caught.value.field)
    with pytest.raises(InvalidRequest, match=str(limits.max_context_tokens)):
        client.generate([TokenIds(too_long)])
    with Client(client_address(client), model="nobody") as other, pytest.raises(NotFound):
        other.generate("text")
    wait_until("every ledger is empty", lambda: ledgers_are_empty(client))


def client_address(client: Client) -> str:
    return next(node.address for node in client.cluster().nodes if node.role == "gateway")
