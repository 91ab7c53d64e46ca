"""Asking a decode node of a tiny cluster, and what its answers must be."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import grpc
from tiny_cluster import TENANT, WAIT_S, Parts, ids_of, prompt_of

from spolia.v1 import common_pb2, decode_pb2
from spolia.v1.decode_pb2_grpc import DecodeServiceStub
from spolia_core.reuse import ReuseMode, ReuseReport, TokenSource
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_engine.engine import Completion
from spolia_node.calls import call_errors
from spolia_node.rpc_messages import report_from_pb, sampling_to_pb

MARGIN = 1e-3
"""Where the oracle's two best logits lie closer, another order of sums may choose the other: comparison stops."""


@dataclass
class Answer:
    """What a stream said."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: common_pb2.Finish | None = None

    @property
    def report(self) -> ReuseReport:
        """The finish's report."""
        assert self.finish is not None
        return report_from_pb(self.finish.reuse)

    @property
    def sources(self) -> dict[TokenSource, int]:
        """Prompt tokens by source."""
        return dict(self.report.sources)

    def take(self, response: decode_pb2.DecodeServiceGenerateResponse) -> None:
        """Adds a response, checking that deltas follow each other."""
        assert self.finish is None, "nothing follows a finish"
        if response.HasField("finish"):
            self.finish = response.finish
            return
        assert response.delta.token_index == len(self.token_ids) or not response.delta.token_ids
        self.token_ids += response.delta.token_ids
        self.text += response.delta.text


class SampleAnswers:
    """What a stream said of each sample."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = defaultdict(list)
        self.texts: dict[int, str] = defaultdict(str)
        self.logprobs: dict[int, list[common_pb2.TokenLogprobs]] = defaultdict(list)
        self.finish = common_pb2.Finish()
        self.is_finished = False

    @property
    def reasons(self) -> list[common_pb2.FinishReason]:
        """Why each sample ended."""
        return [sample.reason for sample in self.finish.samples]

    def take(self, response: decode_pb2.DecodeServiceGenerateResponse) -> None:
        """Adds a response."""
        assert not self.is_finished, "nothing follows a finish"
        if response.HasField("finish"):
            self.finish, self.is_finished = response.finish, True
            return
        delta = response.delta
        self.token_ids[delta.sample_index] += delta.token_ids
        self.texts[delta.sample_index] += delta.text
        self.logprobs[delta.sample_index] += delta.logprobs


def generate_request(
    node: DecodeNode, prompt_parts: Parts, params: SamplingParams, mode: ReuseMode = ReuseMode.EXACT, **fields: Any
) -> decode_pb2.DecodeServiceGenerateRequest:
    """A good request; `fields` change it."""
    prompt = prompt_of(prompt_parts, ids_of(node.engine))
    return decode_pb2.DecodeServiceGenerateRequest(
        **{
            "request_id": "request",
            "tenant_id": TENANT,
            "fingerprint": node.engine.adapter.fingerprint,
            "parts": [common_pb2.TokenPart(token_ids=p.token_ids, chunk_id=p.chunk_id or b"") for p in prompt.parts],
            "mode": int(mode),
            "sampling": sampling_to_pb(params),
            "num_sink_tokens": node.engine.recipe.num_sink_tokens,
            **fields,
        }
    )


@asynccontextmanager
async def calling(
    node: DecodeNode, request: decode_pb2.DecodeServiceGenerateRequest, timeout: float | None = WAIT_S
) -> AsyncIterator[Any]:
    """A Generate call under way; dropped at the end."""
    async with grpc.aio.insecure_channel(node.server.address) as channel:
        with call_errors("decode"):
            call = DecodeServiceStub(channel).Generate(request, timeout=timeout)
            try:
                yield call
            finally:
                call.cancel()


async def send(
    node: DecodeNode, request: decode_pb2.DecodeServiceGenerateRequest, timeout: float | None = WAIT_S
) -> Answer:
    """The whole answer. Raises what the node raised, and checks that the report accounts for the whole prompt."""
    answer = Answer()
    async with calling(node, request, timeout) as call:
        async for response in call:
            answer.take(response)
    assert answer.finish is not None
    assert answer.finish.num_generated_tokens >= len(answer.token_ids)
    if not request.HasField("resume") or answer.token_ids:
        assert_accounts_for_the_prompt(answer)
    assert answer.report.nodes[0] == node.config.node_id
    return answer


async def resume(node: DecodeNode, request: decode_pb2.DecodeServiceGenerateRequest, seen: Sequence[int]) -> Answer:
    """What a replay adds to the tokens already `seen`, all of whose text was, too: a letter each."""
    replay = decode_pb2.DecodeServiceGenerateRequest()
    replay.CopyFrom(request)
    replay.resume.CopyFrom(
        decode_pb2.Resume(samples=[decode_pb2.ResumedSample(token_ids=seen, num_text_code_points=len(seen))])
    )
    answer = Answer(list(seen))  # so that indices are checked
    async with calling(node, replay) as call:
        async for response in call:
            answer.take(response)
    del answer.token_ids[: len(seen)]
    assert answer.finish is not None
    if answer.token_ids:  # else the answer was over already, and no prompt was read
        assert_accounts_for_the_prompt(answer)
    return answer


async def ask_samples(
    node: DecodeNode, prompt_parts: Parts, params: SamplingParams, mode: ReuseMode = ReuseMode.EXACT, **fields: Any
) -> SampleAnswers:
    """All that a request for several samples is answered."""
    answers = SampleAnswers()
    async with calling(node, generate_request(node, prompt_parts, params, mode, **fields)) as call:
        async for response in call:
            answers.take(response)
    assert answers.is_finished
    return answers


def assert_accounts_for_the_prompt(answer: Answer) -> None:
    """Every prompt token has one source, and the runs say the same in their order, none next to one of its source."""
    report = answer.report
    assert report.num_prompt_tokens == answer.finish.num_prompt_tokens, answer.sources
    in_runs: Counter[TokenSource] = Counter()
    for run in report.runs:
        in_runs[run.source] += run.num_tokens
    assert in_runs == report.sources
    assert all(one.source != next_one.source for one, next_one in pairwise(report.runs)), report.runs


async def ask(
    node: DecodeNode, parts: Parts, params: SamplingParams, mode: ReuseMode = ReuseMode.EXACT, **fields: Any
) -> Answer:
    """The whole answer to a prompt."""
    return await send(node, generate_request(node, parts, params, mode, **fields))


def assert_same(answer: Answer, expected: Completion, start: int = 0) -> None:
    """Token for token from `start`, as far as the oracle was sure of itself; and sure it must be of most."""
    unsure = next((i for i, margin in enumerate(expected.margins) if margin < MARGIN), len(expected.margins))
    assert unsure >= min(4, len(expected.margins)), "choose another prompt: the oracle is unsure at once"
    assert answer.token_ids[: unsure - start] == list(expected.token_ids[start:unsure])
    if unsure == len(expected.margins):
        assert len(answer.token_ids) == len(expected.token_ids) - start
        if start == 0:
            assert answer.text == expected.text
