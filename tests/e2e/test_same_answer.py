"""The disaggregated greedy answer equals the single-process one, token for token."""

from __future__ import annotations

import pytest
from e2e_world import Oracle, ask_exact, num_equal, prompts, wait_until

from spolia import Client, Document, TokenSource
from spolia.local_cluster import LocalCluster
from spolia_core.reuse import PREFIX_CHUNK_TOKENS

pytestmark = pytest.mark.slow

NUM_TOKENS = 24
BLOCK = PREFIX_CHUNK_TOKENS


def bos_of(oracle: Oracle) -> list[int]:
    return [oracle.engine.adapter.bos_token_id]


def test_twenty_prompts_cold_and_warm_equal_the_oracle(client: Client, oracle: Oracle) -> None:
    compared = 0
    for text in prompts(20, seed=1):
        token_ids = client.tokenize(text)
        expected = oracle.answer(bos_of(oracle) + token_ids, NUM_TOKENS)
        for warm in (False, True):
            result = ask_exact(client, token_ids, NUM_TOKENS)
            compared += num_equal(expected, result.token_ids)
            assert sum(result.reuse.sources.values()) == result.num_prompt_tokens == len(token_ids) + 1
            cached = result.num_prompt_tokens - result.reuse.sources.get(TokenSource.COMPUTED, 0)
            assert cached == (len(token_ids) // BLOCK * BLOCK if warm else 0), result.reuse
            if not warm:
                assert any(node.startswith("prefill") for node in result.reuse.nodes), "prefill must have computed it"
    assert compared >= 0.8 * 2 * 20 * NUM_TOKENS, f"only {compared} tokens could be compared"


def test_second_turn_of_a_chat_reuses_the_first_answer(client: Client, oracle: Oracle) -> None:
    first = client.tokenize(prompts(8, seed=2)[-1])
    answer = ask_exact(client, first, 2 * BLOCK)
    num_equal(oracle.answer(bos_of(oracle) + first, 2 * BLOCK), answer.token_ids)
    second = [*first, *answer.token_ids, *client.tokenize("And then what happened?")]

    def reused() -> int:
        result = ask_exact(client, second, NUM_TOKENS)
        num_equal(oracle.answer(bos_of(oracle) + second, NUM_TOKENS), result.token_ids)
        return result.reuse.num_reused_tokens

    with_kv = 1 + len(first) + 2 * BLOCK - 1  # the last generated token has no KV yet
    assert reused() >= with_kv // BLOCK * BLOCK > 1 + len(first), "blocks of the first answer must be reused"


def test_bytes_handed_off_do_not_grow_with_reused_text(client: Client, oracle: Oracle) -> None:
    bytes_per_token = oracle.engine.adapter.kv_shape.bytes_per_token
    head = client.tokenize("".join(prompts(12, seed=3)))
    tail = client.tokenize("The end of it.")
    for num_blocks in (2, 6):
        prompt = head[: num_blocks * BLOCK - 1]  # with the begin-of-sequence token: whole blocks
        ask_exact(client, prompt, 2)
        result = ask_exact(client, prompt + tail, 2)
        assert result.reuse.num_reused_tokens == num_blocks * BLOCK
        assert sum(t.live_bytes for t in result.reuse.transfers) == len(tail) * bytes_per_token


def test_reordered_documents_are_reused_on_another_decode_node_from_the_store(cluster: LocalCluster) -> None:
    texts = prompts(6, seed=4)[2:]
    with Client(cluster.address) as client:
        cold = client.generate([*map(Document, texts), "What stood there?"], mode="linked", max_tokens=4)
        assert cold.reuse.sources[TokenSource.COMPILED] > 0
        node = cluster.add_node("decode")
        wait_until("the new node is listed", lambda: any(n.address == node.address for n in client.cluster().nodes))
        first = next(n for n in cluster.nodes if n.role == "decode")
        cluster.kill(first)
        warm = client.generate([*map(Document, reversed(texts)), "What stood there?"], mode="linked", max_tokens=4)
        assert warm.reuse.sources[TokenSource.HOST] > 0, warm.reuse
        assert TokenSource.COMPILED not in warm.reuse.sources
        assert not warm.reuse.misses
