"""How much of everything a tenant may have at once, and that it gets it back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from gateway_fakes import WAIT_S, FakeDecode, hangs
from gateway_worlds import text_request
from key_worlds import Keys, generate, guarded, refusal, shown, tokenize, until

from spolia.v1 import gateway_pb2
from spolia_core.errors import Busy, InvalidRequest


async def test_a_tenant_at_its_limit_is_told_when_to_come_back_and_others_are_not_in_its_way(
    model: Path, keys: Keys
) -> None:
    keys.limit("acme", max_requests=1)
    decode = FakeDecode("a", hangs)
    async with guarded(model, keys, decode) as w:
        other_key = keys.make("acme")  # a second key is no second limit
        assert w.node._keys is not None
        watch = w.node._keys
        await until(lambda: watch.book.find(other_key) is not None)
        call = w.stub.Generate(text_request("the stones"), timeout=WAIT_S, metadata=shown(keys.of["acme"]))
        await call.read()
        for work in (generate(w, other_key), tokenize(w, shown(other_key))):
            error, code = await refusal(work)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(error, Busy)
            assert error.retry_after_ms > 0
        labels = {"tenant": "acme", "limit": "requests"}
        assert w.node.server.metrics.value("spolia_gateway_limited_total", **labels) == 2
        assert await tokenize(w, shown(keys.of["bolt"]))
        call.cancel()
        await until(lambda: not w.node.gateway.use.requests)
        assert await tokenize(w, shown(other_key))


async def test_tokens_in_flight_are_the_prompts_and_all_that_may_be_generated(model: Path, keys: Keys) -> None:
    keys.limit("acme", max_tokens=60)
    decode = FakeDecode("a", hangs)

    def asking(max_tokens: int, num_samples: int = 1) -> gateway_pb2.GenerateRequest:
        request = text_request("the")
        request.sampling.max_tokens = max_tokens
        request.sampling.num_samples = num_samples
        return request

    async with guarded(model, keys, decode) as w:
        key = keys.of["acme"]
        num_prompt = len(await tokenize(w, shown(key), "the"))
        for too_much in (asking(60), asking(20, 3)):
            error, code = await refusal(generate(w, key, too_much))
            assert (type(error), code) == (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT)
            assert error.field == "sampling.max_tokens"
        call = w.stub.Generate(asking(40), timeout=WAIT_S, metadata=shown(key))
        await call.read()
        held = w.node.gateway.use.tokens["acme"]
        assert num_prompt + 40 <= held <= num_prompt + 41  # a token that begins a text may be added
        error, code = await refusal(generate(w, key, asking(40)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_ms > 0
        call.cancel()
        await until(lambda: not w.node.gateway.use.tokens)


async def test_a_warming_holds_the_tokens_of_all_its_documents(model: Path, keys: Keys) -> None:
    text, metadata = "stones " * 10, shown(keys.of["acme"])

    def warming(num_documents: int) -> gateway_pb2.WarmRequest:
        documents = [gateway_pb2.Document(text=f"{number} {text}") for number in range(num_documents)]
        return gateway_pb2.WarmRequest(documents=documents)

    async with guarded(model, keys, FakeDecode("a"), num_prefills=1) as w:
        num_tokens = len(await tokenize(w, metadata, f"0 {text}"))
        keys.limit("acme", max_tokens=num_tokens * 3 // 2)
        await until(lambda: w.node.identities.of(keys.of["acme"]).limits.max_tokens)
        (prefill,) = w.prefills.values()
        prefill.hold = asyncio.Event()
        error, code = await refusal(w.stub.Warm(warming(2), timeout=WAIT_S, metadata=metadata).read())
        assert (type(error), code, error.field) == (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, "documents")
        call = w.stub.Warm(warming(1), timeout=WAIT_S, metadata=metadata)
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait_for(prefill.started.wait(), WAIT_S)
        assert w.node.gateway.use.tokens["acme"] == num_tokens
        _, code = await refusal(w.stub.Warm(warming(1), timeout=WAIT_S, metadata=metadata).read())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        prefill.hold.set()
        assert (await reading).num_tokens == num_tokens
        await until(lambda: not w.node.gateway.use.tokens and not w.node.gateway.use.requests)


async def test_every_way_a_call_ends_gives_back_what_it_held(model: Path, keys: Keys) -> None:
    keys.limit("acme", max_requests=1, max_tokens=300)
    broken = text_request("the stones")
    broken.sampling.max_tokens = 2**31
    async with guarded(model, keys, FakeDecode("a")) as w:
        key = keys.of["acme"]
        for _ in range(3):
            assert await generate(w, key) > 1
            await refusal(generate(w, key, gateway_pb2.GenerateRequest()))
            await refusal(generate(w, key, broken))
            await refusal(w.stub.Forget(gateway_pb2.ForgetRequest(), timeout=WAIT_S, metadata=shown(key)))
        await until(lambda: not w.node.gateway.use.requests and not w.node.gateway.use.tokens)
