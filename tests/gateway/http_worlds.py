"""A gateway among fakes, met over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
from gateway_fakes import WAIT_S, FakeDecode
from gateway_tokenizers import byte_level_tokenizer, write_model
from gateway_worlds import World, world

from spolia.v1 import common_pb2, decode_pb2

TEMPLATE = (
    "{{ bos_token }}{% for document in documents or [] %}{{ document.title }}|{{ document.text }}{% endfor %}"
    "{% for message in messages %}[user]{{ message.role }}{{ message.name }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}{{ mood }}"
)
"""Knows documents, and a variable of its own."""


@dataclass
class HttpWorld:
    """The world, the official client of its gateway and a plain one."""

    world: World
    openai: openai.AsyncOpenAI
    http: httpx2.AsyncClient

    async def metric(self, name: str) -> str:
        """The line of a metric."""
        text = (await self.http.get("/metrics")).text
        return next(line for line in text.splitlines() if line.startswith(name))


@asynccontextmanager
async def http_world(model: Path, decodes: Sequence[FakeDecode], **changes: Any) -> AsyncIterator[HttpWorld]:
    """Starts it and ends it; retries are left to the tests."""
    async with world(model, decodes=decodes, **({"http_port": 0} | changes)) as made:
        base = f"http://{made.node.http_address}"
        async with (
            openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client,
            httpx2.AsyncClient(base_url=base, timeout=WAIT_S) as plain,
        ):
            yield HttpWorld(made, client, plain)


def chat_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A model directory with a chat template, or without."""
    config = {} if template is None else {"chat_template": template}
    return write_model(folder, byte_level_tokenizer(), bos_token="<s>", eos_token="</s>", **config)


async def says(node: FakeDecode, request: Any, context: Any) -> AsyncIterator[Any]:
    """Each of the samples says "ab!", a token a letter, with as many log-probabilities as were asked for; the finish
    tells a reuse report of every kind.
    """
    for index, letter in enumerate("ab!"):
        for sample in range(request.sampling.num_samples):
            yield decode_pb2.DecodeServiceGenerateResponse(delta=_delta(index, letter, sample, request.sampling))
    reasons = [common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_EOS]
    samples = [
        common_pb2.SampleFinish(reason=reasons[sample % 2], num_generated_tokens=3)
        for sample in range(request.sampling.num_samples)
    ]
    num_tokens = sum(len(part.token_ids) for part in request.parts)
    source = common_pb2.SourceCount
    yield decode_pb2.DecodeServiceGenerateResponse(
        finish=common_pb2.Finish(
            reason=samples[0].reason,
            samples=samples,
            num_prompt_tokens=num_tokens,
            num_generated_tokens=3 * len(samples),
            seed=request.sampling.seed,
            reuse=common_pb2.ReuseReport(
                mode=request.mode,
                profile="default",
                nodes=[node.node_id],
                sources=[
                    source(source=common_pb2.TOKEN_SOURCE_COMPUTED, num_tokens=max(0, num_tokens - 5)),
                    source(source=common_pb2.TOKEN_SOURCE_LINK, num_tokens=1),
                    source(source=common_pb2.TOKEN_SOURCE_DEVICE, num_tokens=2),
                    source(source=common_pb2.TOKEN_SOURCE_DISK, num_tokens=2),
                ],
                misses=[
                    common_pb2.Miss(
                        kind=common_pb2.CHUNK_KIND_LOCAL, reason=common_pb2.MISS_REASON_STORE_LATE, num_tokens=7
                    )
                ],
            ),
        )
    )


def _delta(index: int, letter: str, sample: int, sampling: common_pb2.SamplingParams) -> common_pb2.TokenDelta:
    token_id = token_of(letter)
    logprobs = []
    if sampling.HasField("num_top_logprobs"):
        top = [
            common_pb2.TopLogprob(token_id=token_of("xyz"[rank % 3]), logprob=-1.0 - rank)
            for rank in range(sampling.num_top_logprobs)
        ]
        logprobs = [common_pb2.TokenLogprobs(logprob=float("-inf") if letter == "!" else -0.5, top=top)]
    return common_pb2.TokenDelta(
        token_index=index,
        token_ids=[token_id],
        text=letter,
        text_offset=index,
        sample_index=sample,
        logprobs=logprobs,
    )


def token_of(letter: str) -> int:
    """Its id in the byte-level tokenizer."""
    token_id = byte_level_tokenizer().token_to_id(letter)
    assert token_id is not None
    return int(token_id)


def events_of(body: str) -> list[Any]:
    """The stream's events, its framing checked: `data:` lines, each followed by an empty one; JSON but for `[DONE]`."""
    frames = body.split("\n\n")
    assert frames.pop() == "", "the stream ends with an empty line"
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [frame[6:] if frame[6:] == "[DONE]" else json.loads(frame[6:]) for frame in frames]
