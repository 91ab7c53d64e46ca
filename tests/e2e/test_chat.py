"""Chats on a cluster of real processes: answered as over HTTP, and what was said and read before is reused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import httpx2
import pytest
from e2e_world import prompts

from spolia import AsyncClient, ChatMessage, Client, Document, Result, TokenSource
from spolia.local_cluster import LocalCluster
from spolia_core.ids import PREFIX_CHUNK_TOKENS

SPOLIA = Path(sys.executable).with_name("spolia")
SYSTEM = ChatMessage("system", prompts(3, seed=91)[2])
QUESTIONS = [f"{text}Who is the captain of the Bulette?" for text in prompts(5, seed=92)[2:]]


def asked(question: str) -> ChatMessage:
    return ChatMessage("user", question)


def said(answer: Result) -> ChatMessage:
    return ChatMessage("assistant", answer.text)


def told(talk: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """As OpenAI's clients write it."""
    return [{"role": message.role, "content": message.content} for message in talk]


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many they begin with alike."""
    return sum(takewhile(bool, map(eq, one, other)))


def over_http(cluster: LocalCluster, path: str, **body: Any) -> Any:
    answer = httpx2.post(f"http://{cluster.http_address}{path}", json=body, timeout=60.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("documents", [(), tuple(text + "\n" for text in prompts(4, seed=93)[2:])])
def test_a_chat_is_answered_as_over_http(documents: Sequence[str], cluster: LocalCluster, client: Client) -> None:
    talk: list[ChatMessage] = [SYSTEM]
    for question in QUESTIONS[:2]:
        talk.append(asked(question))
        answer = client.chat(talk, documents=documents, max_tokens=16, temperature=0.0)
        body = {"messages": told(talk), "documents": documents, "max_tokens": 16, "temperature": 0}
        same = over_http(cluster, "/v1/chat/completions", **body)
        assert answer.text == same["choices"][0]["message"]["content"]
        assert answer.num_prompt_tokens == same["usage"]["prompt_tokens"]
        assert answer.num_generated_tokens == same["usage"]["completion_tokens"]
        talk.append(said(answer))


def test_the_next_turn_finds_every_whole_block_of_the_conversation_so_far(
    cluster: LocalCluster, client: Client
) -> None:
    talk: list[ChatMessage] = [ChatMessage("system", prompts(5, seed=95)[4])]
    before: list[int] = []
    repeated: list[int] = []
    for question in QUESTIONS:
        talk.append(asked(question))
        prompt_ids = over_http(cluster, "/tokenize", messages=told(talk))["tokens"]
        answer = client.chat(talk, max_tokens=40, temperature=0.0)
        assert answer.num_prompt_tokens == len(prompt_ids)
        blocks = num_shared(before, prompt_ids) // PREFIX_CHUNK_TOKENS * PREFIX_CHUNK_TOKENS
        assert answer.reuse.num_reused_tokens == answer.reuse.sources.get(TokenSource.DEVICE, 0) == blocks
        repeated.append(blocks)
        before = [*prompt_ids, *answer.token_ids[:-1]]  # the last token's KV is never computed
        talk.append(said(answer))
    assert repeated[0] == 0
    assert repeated[2] > repeated[1] > 0, "the first question and its answer are part of what is found"


def test_documents_of_a_chat_are_reused_in_every_turn_and_order_and_where_a_prompt_names_them(
    client: Client,
) -> None:
    texts = [text + "\n" for text in prompts(6, seed=94)[3:]]
    documents = [Document(text, name=str(index)) for index, text in enumerate(texts)]
    num_tokens = sum(warmed.num_tokens for warmed in client.warm(documents))

    def reused(answer: Result) -> int:
        assert answer.reuse.misses == ()
        assert answer.reuse.num_link_tokens <= len(documents) * answer.reuse.link_tokens_per_chunk
        assert answer.reuse.num_reused_tokens >= num_tokens - len(documents) * answer.reuse.link_tokens_per_chunk
        return answer.reuse.num_reused_tokens

    prompt = [*documents, "Question: Who is the captain?\nAnswer:"]
    reused(client.generate(prompt, mode="linked", max_tokens=2))
    talk: list[ChatMessage] = [asked("Who is the captain?")]
    for given in (documents, documents[::-1]):
        answer = client.chat(talk, documents=given, mode="linked", max_tokens=12, temperature=0.0)
        assert reused(answer) > answer.num_prompt_tokens / 2
        talk += [said(answer), asked("And why?")]


def test_asyncio_streams_the_same_chat(cluster: LocalCluster, client: Client) -> None:
    talk: list[ChatMessage] = [SYSTEM, asked(QUESTIONS[0])]

    async def streamed() -> tuple[str, str]:
        async with AsyncClient(cluster.address, timeout_s=60.0) as other:
            whole = await other.chat(talk, max_tokens=12, temperature=0.0)
            async with other.stream_chat(talk, max_tokens=12, temperature=0.0) as stream:
                return whole.text, "".join([delta.text async for delta in stream])

    text = client.chat(talk, max_tokens=12, temperature=0.0).text
    assert asyncio.run(streamed()) == (text, text)


def test_the_command_talks_through_the_template_about_documents(
    cluster: LocalCluster, client: Client, tmp_path: Path
) -> None:
    page = tmp_path / "page.txt"
    page.write_text(prompts(3, seed=96)[2])
    lines = ["Who is the captain?", "And why?"]
    ran = subprocess.run(
        [SPOLIA, "chat", "--address", cluster.address, "-d", page, "--system", "Read.", "--max-tokens", "12"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    talk, texts = [ChatMessage("system", "Read.")], []
    for line in lines:
        talk.append(asked(line))
        answer = client.chat(talk, Document(page.read_text()), mode="linked", max_tokens=12, temperature=0.0)
        texts.append(answer.text)
        talk.append(said(answer))
    assert ran.stdout == "".join(f"{text}\n" for text in texts)
    assert "plain text" not in ran.stderr
