"""OpenAI-compatible HTTP on a cluster of real processes, through the official client."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e_world import ledgers_are_empty, prompts, wait_until

from spolia import Client, Document, MissReason, TokenIds
from spolia.local_cluster import LocalCluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_STREAMS = 100
QUESTION: list[Any] = [{"role": "user", "content": "Who is the captain of the Bulette?"}]


@pytest.fixture
def http(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{cluster.http_address}/v1", api_key="none", max_retries=0) as client:
        yield client


def spolia_of(usage: Any) -> Any:
    return usage.model_extra["spolia"]


def test_documents_are_reused_in_another_order(http: openai.OpenAI) -> None:
    documents = [text + "\n" for text in prompts(5, seed=81)[1:]]
    cached = []
    for given in (documents, documents[::-1]):
        extra = {"documents": given, "reuse": "linked"}
        answer = http.chat.completions.create(model="demo", messages=QUESTION, max_tokens=4, extra_body=extra)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        report = spolia_of(answer.usage)
        assert report["mode"] == "linked"
        assert sum(report["sources"].values()) == answer.usage.prompt_tokens
        assert sum(num_tokens for _, num_tokens in report["runs"]) == answer.usage.prompt_tokens
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == 0
    assert cached[1] > answer.usage.prompt_tokens / 2
    assert cached[1] == report["sources"]["device"]


def test_an_exact_chat_is_answered_as_over_grpc(http: openai.OpenAI, client: Client) -> None:
    for text in prompts(3, seed=82):
        turns: list[Any] = [{"role": "system", "content": text}, *QUESTION]
        chat = http.chat.completions.create(model="demo", messages=turns, temperature=0, max_tokens=12)
        tokenized = http.post("/../tokenize", cast_to=object, body={"messages": turns})
        assert isinstance(tokenized, dict)
        same = client.generate([TokenIds(tuple(tokenized["tokens"]))], max_tokens=12, temperature=0.0)
        assert chat.choices[0].message.content == same.text
        assert chat.usage is not None
        assert chat.usage.prompt_tokens == same.num_prompt_tokens
        assert chat.usage.completion_tokens == same.num_generated_tokens


def test_a_seed_gives_the_same_samples_streamed_or_not(http: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "n": 2, "seed": 5, "max_tokens": 10}
    whole = http.completions.create(**asked, logprobs=2)
    texts, streamed = {0: "", 1: ""}, {0: [], 1: []}  # type: dict[int, str], dict[int, list[float]]
    for chunk in http.completions.create(**asked, logprobs=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                streamed[choice.index] += [p for p in choice.logprobs.token_logprobs or [] if p is not None]
    for choice in whole.choices:
        assert choice.text == texts[choice.index]
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens).startswith(choice.text)
        assert choice.logprobs.token_logprobs == pytest.approx(streamed[choice.index], abs=1e-4)
    assert texts[0] != texts[1]


def test_an_answer_matches_the_schema_that_was_asked_for(http: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ship": {"enum": ["Bulette"]}}, "required": ["ship"]}
    given: Any = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": schema | {"additionalProperties": False}},
    }
    answer = http.chat.completions.create(model="demo", messages=QUESTION, max_tokens=60, response_format=given)
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "") == {"ship": "Bulette"}
    given["json_schema"]["schema"] = {"type": "nothing"}
    with pytest.raises(openai.BadRequestError) as caught:
        http.chat.completions.create(model="demo", messages=QUESTION, response_format=given)
    assert caught.value.param == "response_format.json_schema.schema"


def test_a_required_call_has_valid_arguments_whatever_the_model_thinks(http: openai.OpenAI) -> None:
    properties = {"ship": {"enum": ["Bulette", "Marigold"]}, "year": {"type": "integer", "minimum": 1, "maximum": 9}}
    parameters = {"type": "object", "properties": properties, "required": ["ship", "year"]}
    captain = {"name": "captain_of", "parameters": parameters | {"additionalProperties": False}}
    tools: Any = [{"type": "function", "function": captain}, {"type": "function", "function": {"name": "wait"}}]
    asked: Any = {"model": "demo", "messages": QUESTION, "tools": tools, "seed": 3, "n": 2, "max_tokens": 600}

    def check(choice: Any) -> list[tuple[str, str]]:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        for name, text in calls:
            arguments = json.loads(text)
            if name == "wait":
                assert arguments == {}
                continue
            assert (name, list(arguments)) == ("captain_of", ["ship", "year"])
            assert arguments["ship"] in ("Bulette", "Marigold")
            assert arguments["year"] in range(1, 10)
        return calls

    for choice in ("required", {"type": "function", "function": {"name": "captain_of"}}):
        whole = http.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=False)
        with http.chat.completions.stream(**asked, tool_choice=choice, parallel_tool_calls=False) as stream:
            streamed = stream.get_final_completion()
        for one, same in zip(whole.choices, streamed.choices, strict=True):
            assert len(check(one)) == 1
            assert check(one) == check(same)
    assert check(whole.choices[0])[0][0] == "captain_of"
    properties["year"]["uniqueItems"] = True
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        http.chat.completions.create(**asked)
    assert caught.value.param == "tools[0].function.parameters"


def test_requests_of_different_salts_share_nothing(http: openai.OpenAI) -> None:
    document = " ".join(prompts(6, seed=83))

    def cached(mode: str, salt: str) -> int:
        extra = {"documents": [document], "reuse": mode, "cache_salt": salt}
        answer = http.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2, extra_body=extra)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    for mode in ("linked", "exact"):
        assert cached(mode, "one") == 0
        assert cached(mode, "two") == 0, "nothing of another salt is found"
        assert cached(mode, "one") > 0
        assert cached(mode, "") == 0


def test_what_was_warmed_under_a_salt_is_reused_and_forgotten_under_that_salt_only(client: Client) -> None:
    document = Document(" ".join(prompts(6, seed=87)))
    (warmed,) = client.warm(document, cache_salt="one")
    assert not warmed.already_stored
    assert client.forget(document, cache_salt="two").num_stored_dropped == 0
    assert client.warm(document, cache_salt="one")[0].already_stored

    def misses(salt: str) -> int:
        answer = client.generate([document, "Who?"], mode="linked", max_tokens=2, cache_salt=salt)
        return sum(miss.reason is MissReason.NOT_FOUND for miss in answer.reuse.misses)

    assert (misses("one"), misses("two"), misses("")) == (0, 1, 1)
    assert client.forget(document, cache_salt="one").num_stored_dropped == 1
    assert (misses("one"), misses("two")) == (1, 0)


async def test_a_hundred_streams_at_once_are_all_answered(cluster: LocalCluster) -> None:
    base = f"http://{cluster.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=60.0) as client:

        async def one(number: int) -> tuple[int, str | None]:
            stream = await client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": f"What is number {number}?"}],
                max_tokens=6,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage is not None
            return chunks[-1].usage.completion_tokens, chunks[-2].choices[0].finish_reason

        answers = await asyncio.gather(*(one(number) for number in range(NUM_STREAMS)))
    assert answers == [(6, "length")] * NUM_STREAMS


def test_dropped_streams_free_every_node(http: openai.OpenAI, client: Client) -> None:
    extra: Any = {"documents": prompts(4, seed=84), "ignore_eos": True}
    for mode in ("exact", "linked"):
        for stop_after in (0, 1, 20):
            stream = http.chat.completions.create(
                model="demo", messages=QUESTION, max_tokens=2000, stream=True, extra_body=extra | {"reuse": mode}
            )
            for count, _ in enumerate(stream):
                if count >= stop_after:
                    break
            stream.close()
    with pytest.raises(openai.APITimeoutError):
        http.with_options(timeout=0.3).chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=4000, extra_body=extra
        )
    wait_until("every ledger is empty", lambda: ledgers_are_empty(client))
    wait_until("the gateway has no work", lambda: all(node.num_running == 0 for node in client.cluster().nodes))


def test_the_examples_of_the_document_work(cluster: LocalCluster) -> None:
    """The address is the one thing changed."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "http.md").read_text(encoding="utf-8"), re.DOTALL)
    documents, agent = [_ran(example.replace("127.0.0.1:8000", cluster.http_address)) for example in found]
    assert "Judith Thorne" in documents
    assert re.search(r"\b[1-9]\d* of \d+ prompt tokens cached", documents), documents
    called = re.match(r"captain_of (\{.*\}) -> (Judith Thorne|Ursel Crane)\n", agent)
    assert called is not None, agent
    assert json.loads(called[1])["ship"] in ("Bulette", "Marigold")
    assert not agent.splitlines()[-1].startswith("captain_of"), "the last is the answer"


def _ran(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
