"""A tiny model, and real nodes around it in one event loop. A world that ends checks that nothing is held anywhere."""

from __future__ import annotations

import asyncio
import string
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM

from spolia.v1 import kvstore_pb2
from spolia.v1.directory_pb2 import NODE_ROLE_PREFILL
from spolia_core.ids import IdSpace, tenant_key
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import MissReason, ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_decode.config import DecodeConfig
from spolia_decode.node import DecodeNode
from spolia_engine.core import EngineCore
from spolia_engine.engine import Completion, Engine
from spolia_engine.extent import BlockState
from spolia_engine.pool import Pool
from spolia_engine.run import Run
from spolia_kvstore.config import KVStoreConfig
from spolia_kvstore.node import KVStoreNode
from spolia_kvstore.objects import ObjectKey
from spolia_node.deadline import Deadline
from spolia_node.store_address import stores_at
from spolia_node.store_client import StoreClient
from spolia_prefill.config import PrefillConfig
from spolia_prefill.node import PrefillNode
from spolia_worker.arriving import ArrivingChunk
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.config import WorkerConfig
from spolia_worker.engine_thread import EngineThread
from spolia_worker.loading import load_engine

TENANT = "tenant"
SECRET = "spolia-development"
LETTERS = string.ascii_letters + string.digits + string.punctuation + "Ġ"
VOCAB_SIZE = len(LETTERS)
NUM_LAYERS = 3
MAX_CONTEXT = 1536
BLOCK_SIZE = 16
BLOCK_BYTES = BLOCK_SIZE * NUM_LAYERS * 2 * 2 * 8 * 4
"""16 tokens, K and V of two heads of eight floats."""

WAIT_S = 40.0


def write_model(path: Path) -> Path:
    """A random Llama with sharp logits, and a tokenizer with one printable letter per token."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=MAX_CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed + 1)
    return [int(i) for i in torch.randint(0, VOCAB_SIZE, (count,), generator=generator)]


@dataclass(frozen=True)
class Doc:
    """Tokens that are a document."""

    token_ids: tuple[int, ...]


def doc(count: int, seed: int = 0) -> Doc:
    """A random document."""
    return Doc(tuple(tokens(count, seed)))


Parts = Sequence[Doc | Sequence[int]]
"""A prompt: documents, and live tokens."""


def prompt_of(parts: Parts, ids: IdSpace) -> Prompt:
    """The prompt under some tenant's ids."""
    made = []
    for part in parts:
        if isinstance(part, Doc):
            made.append(Part(part.token_ids, ids.local(part.token_ids)))
        else:
            made.append(Part(tuple(part)))
    return Prompt(tuple(made))


class World:
    """Nodes of one cluster. Start the store first; prefill nodes before the decode nodes that are to use them."""

    def __init__(self, model: Path, stack: AsyncExitStack) -> None:
        self.model = model
        self.stack = stack
        self.stores: list[KVStoreNode] = []
        self.workers: list[PrefillNode | DecodeNode] = []
        self.directory = ""

    async def store(self, prepare: Callable[[KVStoreNode], None] | None = None, **settings: Any) -> KVStoreNode:
        """A kvstore node that keeps the directory; `prepare` is called before it starts."""
        node = KVStoreNode(KVStoreConfig(**{"log_level": "error", "budget_bytes": 64 << 20, **settings}))
        if prepare:
            prepare(node)
        self.directory = await node.start()
        self.stores.append(node)
        self.stack.push_async_callback(self.kill_store, node)
        return node

    async def kill_store(self, node: KVStoreNode) -> None:
        """Ends a store at once. Does nothing the second time."""
        if node in self.stores:
            self.stores.remove(node)
            await node.server.stop_at_once()
            await node.close()

    async def prefill(self, num_blocks: int | None = None, **settings: Any) -> PrefillNode:
        """A prefill node."""
        config = PrefillConfig(**self._settings(settings))
        node: PrefillNode = await self._started(PrefillNode(config, self._engine(config, num_blocks)))
        return node

    async def decode(
        self, num_blocks: int | None = None, *, engine: Engine | None = None, **settings: Any
    ) -> DecodeNode:
        """A decode node that has heard of every prefill node in this world. `engine`: not one as its settings say.

        Nothing depends on how long things take, unless asked for: a tiny model computes faster than a store answers.
        """
        untimed = {"cost_gate": False, "link_on_prefill": False, "sharing": "always"}
        config = DecodeConfig(**self._settings(untimed | settings))
        node: DecodeNode = await self._started(DecodeNode(config, engine or self._engine(config, num_blocks)))
        await self.sees_prefill(node, sum(isinstance(worker, PrefillNode) for worker in self.workers))
        return node

    async def sees_prefill(self, node: DecodeNode, count: int) -> None:
        """Returns once `node` knows `count` prefill nodes."""
        if node.view is not None:
            await node.view.wait_for(lambda view: len(view.nodes(NODE_ROLE_PREFILL)) >= count, Deadline.after(WAIT_S))

    async def kill(self, node: PrefillNode | DecodeNode) -> None:
        """Ends a node at once. Does nothing the second time."""
        if node in self.workers:
            self.workers.remove(node)
            await node.server.stop_at_once()
            await node.close()

    def oracle(self) -> Engine:
        """A single process with the same model, nothing cached."""
        return Engine.load(self.model, pool_bytes=16 << 20)

    def expect(
        self, parts: Parts, params: SamplingParams, mode: ReuseMode = ReuseMode.EXACT, link_tokens: int = 16
    ) -> Completion:
        """What a fresh single process answers."""
        engine = self.oracle()
        return engine.generate(prompt_of(parts, engine.ids), params, mode=mode, num_link_tokens=link_tokens)

    async def nothing_held(self) -> None:
        """Fails unless every pool, claim and transfer comes to rest with nothing held by anyone."""
        for worker in self.workers:
            await eventually(partial(is_idle, worker.engine.pool), f"{worker.config.node_id} holds memory")
            worker.engine.pool.check_invariants()
            if isinstance(worker, PrefillNode):
                await eventually(lambda w=worker: w.service.num_running == 0, "prefill counts a running job")
                assert worker.service.queued_tokens == 0
            else:
                await eventually(lambda w=worker: w.batch.num_sequences == 0, "a sequence is left")
                await eventually(lambda w=worker: w.admission.num_running == 0, "a place is taken")
                assert worker.admission.num_waiting == worker.admission.queued_tokens == 0
        for store in self.stores:
            await eventually(lambda s=store: s.store.tiers.num_transfers == 0, "the store has a transfer")
            await eventually(lambda s=store: s.store.claims.num_live() == 0, "the store has a claim")
            store.store.check_invariants()

    async def _started(self, node: Any) -> Any:
        await node.start()
        self.workers.append(node)
        self.stack.push_async_callback(self.kill, node)
        if node.server.registration is not None:
            await node.server.registration.wait_registered(Deadline.after(WAIT_S))
        return node

    def _engine(self, config: WorkerConfig, num_blocks: int | None) -> Engine:
        """Of as few blocks of `BLOCK_SIZE` as a test wants, which no setting allows."""
        if num_blocks is None:
            return load_engine(config)
        return Engine.load(self.model, pool_bytes=num_blocks * BLOCK_BYTES, block_size=BLOCK_SIZE)

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        common = {"model": str(self.model), "log_level": "error", "pool_bytes": 8 << 20, "drain_timeout_s": 5.0}
        return {**common, "directory": self.directory, **settings}


@asynccontextmanager
async def a_world(model: Path) -> AsyncIterator[World]:
    """An empty world; at its end nothing may be held, and every node is stopped."""
    async with AsyncExitStack() as stack:
        world = World(model, stack)
        yield world
        await world.nothing_held()


def is_idle(pool: Pool) -> bool:
    """Whether nobody uses the pool's memory: all is free or cached."""
    counts = pool.counts()
    return counts[BlockState.REFERENCED] == counts[BlockState.IN_TRANSFER] == 0


async def eventually(condition: Callable[[], bool], what: str = "") -> None:
    """Returns once `condition` holds; fails after a while. For what happens in a thread or behind a connection."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(what or "it never came to be") from None


def ids_of(engine: Engine) -> IdSpace:
    """The ids of this world's tenant."""
    return engine.id_space(tenant_key(SECRET.encode(), TENANT))


@contextmanager
def held_engine(thread: EngineThread) -> Iterator[Callable[[], None]]:
    """Keeps an engine's thread busy until the function it yields is called, or the block ends."""
    gate = threading.Event()
    began = threading.Event()

    def hold() -> None:
        began.set()
        assert gate.wait(WAIT_S)

    thread.submit(hold)
    assert began.wait(WAIT_S)
    try:
        yield gate.set
    finally:
        gate.set()


def stored(store: KVStoreNode, chunk_id: bytes) -> Any:
    """The stored object of a chunk of this world's tenant, or None."""
    return store.store.tiers.ram.find(ObjectKey(TENANT, chunk_id))


def stored_bytes(store: KVStoreNode, chunk_id: bytes) -> bytes:
    """The bytes of a stored object, as the store has them."""
    found = stored(store, chunk_id)
    assert found is not None
    data: bytes = found.extent.read(0, found.size)
    return data


def damage(store: KVStoreNode, chunk_id: bytes) -> None:
    """Flips a bit of a stored object behind the store's back."""
    found = stored(store, chunk_id)
    assert found is not None
    (last,) = found.extent.pieces(found.size - 1, found.size)
    last[0] ^= 1


async def claim_as(node: PrefillNode | DecodeNode, chunk_id: bytes, owner: str, ttl_ms: int) -> None:
    """Claims a chunk for somebody who is not in this world."""
    client = StoreClient(node.channels, lambda: stores_at(node.config.directory))
    results = await client.claim(TENANT, [chunk_id], owner, Deadline.after(WAIT_S), ttl_ms=ttl_ms)
    assert results[0].state == kvstore_pb2.CLAIM_STATE_GRANTED


def count_calls(monkeypatch: Any, engine: Engine | Pool, name: str) -> list[tuple[Any, ...]]:
    """Records the arguments of every call of a method of an engine or its pool."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(engine, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, name, counted)
    return calls


def record_calls(monkeypatch: Any, owner: Any, name: str, events: list[str], event: str) -> None:
    """Notes an event at every call of a method."""
    original = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        events.append(event)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)


async def fetch_one(fetcher: ChunkFetcher, core: EngineCore, chunk_id: bytes, num_tokens: int) -> MissReason | Run:
    """What becomes of one local chunk's fetch: its run, of which the caller owns a reference, or why it is missed."""
    chunk = ArrivingChunk(core, chunk_id, num_tokens)
    received = await fetcher.fetch_arriving(TENANT, chunk, Deadline.after(10), lambda: None)
    if received.miss is None:
        return chunk.run
    chunk.release()
    return received.miss
