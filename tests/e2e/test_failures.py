"""Nodes die; requests do not."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from e2e_world import DEMO_MODEL, Oracle, ask_exact, ledgers_are_empty, num_equal, prompts, wait_until

from spolia import Client, Document, TokenIds
from spolia.errors import Unavailable
from spolia.local_cluster import LocalCluster

pytestmark = pytest.mark.slow

NUM_TOKENS = 16


@pytest.fixture(scope="module")
def frail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster that loses nodes in the order of the tests below."""
    logs: Path = tmp_path_factory.mktemp("frail")
    with LocalCluster(
        DEMO_MODEL, num_decode=2, log_dir=logs, settings=["--decode.local-prefill-tokens", "0"]
    ) as running:
        yield running


@pytest.fixture
def frail_client(frail: LocalCluster) -> Iterator[Client]:
    with Client(frail.address, timeout_s=90.0) as client:
        yield client


def kill_busy_decode(cluster: LocalCluster, client: Client) -> bool:
    """Kills a decode node that has a request, as far as one is known."""
    busy = [node.address for node in client.cluster().nodes if node.role == "decode" and node.num_running]
    for node in cluster.nodes:
        if busy and node.address == busy[0]:
            cluster.kill(node)
            return True
    return False


def test_killed_prefill_in_mid_request(frail: LocalCluster, frail_client: Client, oracle: Oracle) -> None:
    token_ids = frail_client.tokenize(prompts(6, seed=11)[-1])
    prefill = next(node for node in frail.nodes if node.role == "prefill")
    os.kill(prefill.pid, signal.SIGSTOP)  # it takes the request and cannot finish it
    with frail_client.stream([TokenIds(tuple(token_ids))], max_tokens=NUM_TOKENS, ignore_eos=True) as stream:
        wait_until(
            "a decode node waits for prefill",
            lambda: any(n.role == "decode" and n.in_transfer_blocks for n in frail_client.cluster().nodes),
        )
        frail.kill(prefill)
        result = stream.result()
    bos = oracle.engine.adapter.bos_token_id
    num_equal(oracle.answer([bos, *token_ids], NUM_TOKENS), result.token_ids)
    assert not any(node.startswith("prefill") for node in result.reuse.nodes)
    wait_until("every ledger is empty", lambda: ledgers_are_empty(frail_client))
    frail.add_node("prefill")


def test_killed_decode_in_mid_stream_loses_and_doubles_nothing(
    frail: LocalCluster, frail_client: Client, oracle: Oracle
) -> None:
    num_tokens = 1200
    token_ids = frail_client.tokenize(prompts(4, seed=12)[-1])
    options = {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 0.8, "seed": 5}
    expected = frail_client.generate([TokenIds(tuple(token_ids))], **options)
    received: list[int] = []
    text = ""
    killed = False
    with frail_client.stream([TokenIds(tuple(token_ids))], **options) as stream:
        for delta in stream:
            assert delta.token_index == len(received) or not delta.token_ids
            received += delta.token_ids
            text += delta.text
            if len(received) >= 50 and not killed:
                killed = kill_busy_decode(frail, frail_client)
        result = stream.result()
    assert killed, "the stream ended before the node that served it was known"
    assert len(received) == num_tokens
    assert tuple(received) == result.token_ids
    assert text == result.text
    # Sampled with the same seed, the replay draws the same numbers; rounding may part them at a near tie, not before.
    same = next(
        (i for i, pair in enumerate(zip(received, expected.token_ids, strict=True)) if len(set(pair)) > 1), num_tokens
    )
    assert same >= 50
    wait_until("every ledger is empty", lambda: ledgers_are_empty(frail_client))


def test_killed_decode_goes_on_with_every_sample(frail: LocalCluster, frail_client: Client) -> None:
    frail.add_node("decode")
    wait_until("there are two decode nodes", lambda: sum(n.role == "decode" for n in frail_client.cluster().nodes) == 2)
    num_tokens = 500
    token_ids = frail_client.tokenize(prompts(4, seed=15)[-1])
    options = {"max_tokens": num_tokens, "ignore_eos": True, "temperature": 0.8, "seed": 5, "n": 3}
    expected = frail_client.generate([TokenIds(tuple(token_ids))], **options)
    received: dict[int, list[int]] = {0: [], 1: [], 2: []}
    killed = False
    with frail_client.stream([TokenIds(tuple(token_ids))], **options) as stream:
        for delta in stream:
            received[delta.sample_index] += delta.token_ids
            if not killed and min(map(len, received.values())) >= 30:
                killed = kill_busy_decode(frail, frail_client)
        result = stream.result()
    assert killed, "the stream ended before the node that served it was known"
    for index, (sample, alone) in enumerate(zip(result.samples, expected.samples, strict=True)):
        assert tuple(received[index]) == sample.token_ids
        assert len(sample.token_ids) == num_tokens
        assert sample.token_ids[:30] == alone.token_ids[:30]
    assert len({sample.token_ids for sample in result.samples}) == 3
    wait_until("every ledger is empty", lambda: ledgers_are_empty(frail_client))


def test_killed_store_leaves_requests_running(frail: LocalCluster, frail_client: Client, oracle: Oracle) -> None:
    store = next(node for node in frail.nodes if node.role == "kvstore")
    frail.kill(store)
    texts = prompts(5, seed=13)[2:]
    documents = [Document(text) for text in texts]
    linked = frail_client.generate([*documents, "Who came?"], mode="linked", max_tokens=4)
    assert sum(t.inline_bytes for t in linked.reuse.transfers) > 0, linked.reuse
    token_ids = frail_client.tokenize(prompts(6, seed=14)[-1])
    exact = ask_exact(frail_client, token_ids, NUM_TOKENS)
    bos = oracle.engine.adapter.bos_token_id
    num_equal(oracle.answer([bos, *token_ids], NUM_TOKENS), exact.token_ids)
    assert not frail_client.cluster().directory_reachable


def test_an_answer_that_nobody_goes_on_with_ends_without_an_address_in_its_error(
    frail: LocalCluster, frail_client: Client
) -> None:
    """The last decode nodes die; the log knows where they were."""
    body = {"prompt": "Who came?", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    nodes = [node for node in frail.nodes if node.role == "decode"]
    with (
        httpx2.stream("POST", f"http://{frail.http_address}/v1/completions", json=body, timeout=90.0) as answer,
        frail_client.stream("Who came?", max_tokens=1500, ignore_eos=True) as stream,
    ):
        lines, deltas = answer.iter_lines(), iter(stream)
        begun = [next(lines) for _ in range(4)]
        next(deltas)
        for node in nodes:
            frail.kill(node)
        with pytest.raises(Unavailable) as caught:
            deque(deltas)
        event = [line for line in (*begun, *lines) if line][-1]
    error = json.loads(event.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")
    assert answer.headers["x-request-id"] in error["message"]
    log = next(node.log_path for node in frail.nodes if node.role == "gateway")
    assert log is not None
    said = log.read_text()
    for node in nodes:
        address, port = node.address, f":{node.address.rpartition(':')[2]}"
        for told in (caught.value.message, event, str(answer.headers)):
            assert address not in told
            assert port not in told
            assert "ipv4" not in told
        assert any("attempt failed" in line and address in line for line in said.splitlines())
