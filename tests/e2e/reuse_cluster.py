"""A store, a prefill node and two decode nodes behind a gateway, in this process, asked for documents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tiny_answers import ask
from tiny_cluster import TENANT, WAIT_S, Doc, World, a_world, ids_of
from tiny_gateway import a_gateway

from spolia import AsyncClient, Document, Result
from spolia.v1.directory_pb2 import NODE_ROLE_DECODE, NodeRecord
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.node import DecodeNode
from spolia_gateway.node import GatewayNode
from spolia_node.deadline import Deadline

HEAD = "Read."
TEXTS = ["TheLighthouseStoodAtTheEndOfTheLongPier.", "EveryMorningTheBakerOpenedHerShop." * 2, "ABoatCame." * 6]
QUESTION = "WHO?"
NUM_TOKENS = 8
LINK_TOKENS = 16
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass
class Cluster:
    """A store, a prefill node and two decode nodes behind a gateway."""

    world: World
    decodes: dict[str, DecodeNode]
    gateway: GatewayNode
    client: AsyncClient

    async def ask(self, texts: Sequence[str], question: str = QUESTION) -> Result:
        parts = [HEAD, *map(Document, texts), question]
        return await self.client.generate(parts, mode="linked", max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)

    async def ask_node(self, node: DecodeNode, texts: Sequence[str]) -> None:
        """Past the gateway."""
        head, question = [await self.ids(text) for text in (HEAD, QUESTION)]
        documents = [Doc(tuple(await self.ids(text))) for text in texts]
        await ask(node, [head, *documents, question], PARAMS, ReuseMode.LINKED)

    async def ids(self, text: str) -> list[int]:
        return list(await self.client.tokenize(text))

    async def chunk_id(self, text: str) -> bytes:
        return ids_of(next(iter(self.decodes.values())).engine).local(await self.ids(text))

    async def in_one_process(self, texts: Sequence[str]) -> tuple[int, ...]:
        engine = self.world.oracle()
        documents = [engine.chunk(await self.ids(text)) for text in texts]
        prompt = Prompt((Part(tuple(await self.ids(HEAD))), *documents, Part(tuple(await self.ids(QUESTION)))))
        return tuple(engine.generate(prompt, PARAMS, mode=ReuseMode.LINKED).token_ids)

    def served_by(self, result: Result) -> DecodeNode:
        return self.decodes[next(node_id for node_id in result.reuse.nodes if node_id in self.decodes)]

    def other_than(self, node: DecodeNode) -> DecodeNode:
        return next(other for other in self.decodes.values() if other is not node)

    async def sees(self, node: DecodeNode, predicate: Callable[[NodeRecord], bool]) -> None:
        """Returns once the gateway's view of a decode node is such."""
        await node.server.registration.touch()  # type: ignore[union-attr]  # it is registered
        await self.gateway.cluster.wait_for(
            lambda view: any(
                record.node_id == node.config.node_id and predicate(record) for record in view.nodes(NODE_ROLE_DECODE)
            ),
            Deadline.after(WAIT_S),
        )


@asynccontextmanager
async def a_cluster(model: Path) -> AsyncIterator[Cluster]:
    async with a_world(model) as world:
        await world.store()
        await world.prefill()
        nodes = [await world.decode() for _ in range(2)]
        async with a_gateway(world, TENANT) as gateway:
            await gateway.cluster.wait_for(lambda v: len(v.nodes(NODE_ROLE_DECODE)) == 2, Deadline.after(WAIT_S))
            async with AsyncClient(gateway.server.address, timeout_s=WAIT_S) as client:
                yield Cluster(world, {node.config.node_id: node for node in nodes}, gateway, client)
