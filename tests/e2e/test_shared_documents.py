"""An operator warms a document under the tenant `shared`; requests of another tenant reuse it, where told to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tiny_cluster import World, a_world
from tiny_gateway import client_of

from spolia import AsyncClient, Document, Result, TokenSource
from spolia_core.ids import SHARED_TENANT
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.engine import Completion

MANUAL = Document("TheStonesOfOneBuildingAreCutAndSetAgainInAnother." * 2, name="manual")
QUESTION = "WHO?"
NUM_TOKENS = 12


@asynccontextmanager
async def a_cluster(model: Path) -> AsyncIterator[World]:
    """A store, a prefill node and a decode node."""
    async with a_world(model) as world:
        await world.store()
        await world.prefill()
        await world.decode()
        yield world


async def ask(client: AsyncClient) -> Result:
    return await client.generate(
        [MANUAL, QUESTION], mode="linked", max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
    )


async def in_one_process(world: World, client: AsyncClient) -> Completion:
    """The answer of a single process, nothing cached."""
    engine = world.oracle()
    prompt = Prompt((engine.chunk(await client.tokenize(MANUAL.text)), Part(tuple(await client.tokenize(QUESTION)))))
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return engine.generate(prompt, params, mode=ReuseMode.LINKED)


async def test_a_document_warmed_under_shared_is_reused_by_another_tenant_and_answers_alike(tiny: Path) -> None:
    async with a_cluster(tiny) as world:
        async with client_of(world, SHARED_TENANT) as operator:
            (warmed,) = await operator.warm([MANUAL])
            assert not warmed.already_stored
        async with client_of(world, "museum", shared_documents=True) as reader:
            shared = await ask(reader)
            oracle = await in_one_process(world, reader)
        assert shared.reuse.sources[TokenSource.HOST] == warmed.num_tokens
        assert TokenSource.COMPILED not in shared.reuse.sources
        assert not shared.reuse.misses
        assert not any(node.startswith("prefill") for node in shared.reuse.nodes)
        async with client_of(world, "library") as other:
            own = await ask(other)
        assert own.reuse.sources[TokenSource.COMPILED] == warmed.num_tokens
        assert own.reuse.num_reused_tokens < shared.reuse.num_reused_tokens
        assert shared.token_ids == own.token_ids == tuple(oracle.token_ids)


async def test_a_tenant_that_forgets_leaves_the_shared_document_to_all(tiny: Path) -> None:
    async with a_cluster(tiny) as world:
        async with client_of(world, SHARED_TENANT) as operator:
            (warmed,) = await operator.warm([MANUAL])
        async with client_of(world, "museum", shared_documents=True) as reader:
            await ask(reader)
            assert (await reader.forget([MANUAL])).num_stored_dropped == 0
            again = await ask(reader)
            assert again.reuse.sources[TokenSource.DEVICE] == warmed.num_tokens
        async with client_of(world, SHARED_TENANT) as operator:
            forgotten = await operator.forget([MANUAL])
            assert (forgotten.num_stored_dropped, forgotten.num_resident_dropped) == (1, 2)
        async with client_of(world, "museum", shared_documents=True) as reader:
            compiled = await ask(reader)
            assert compiled.reuse.sources[TokenSource.COMPILED] == warmed.num_tokens
            assert compiled.token_ids == again.token_ids
