"""Memory of a device in pieces: what is free suffices wherever it lies, and an engine reads what lies in pieces."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from engine_worlds import assert_nothing_held, letters, llama_config, tokens
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transformers import LlamaForCausalLM

from spolia_core.chunk_object import KvShape
from spolia_core.errors import Busy
from spolia_core.prompt import Part, Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.context import whole
from spolia_engine.device_decoding import DeviceSettings
from spolia_engine.engine import Engine
from spolia_engine.extent import BlockState, Extent
from spolia_engine.kv_bytes import layer_of_run, write_layer
from spolia_engine.pool import Pool
from spolia_engine.run import Run, copy_kv
from spolia_engine.slot_memory import SlotMemory

PAGE = 16
NUM_BLOCKS = 24
SHAPE = KvShape(2, 1, 2, 2, "F32")


def pool_of(num_blocks: int = NUM_BLOCKS) -> Pool:
    memory = SlotMemory(SHAPE, num_pages=num_blocks, page_size=PAGE, dtype=torch.float32, device="cpu")
    return Pool(SHAPE, num_blocks=num_blocks, block_size=PAGE, slots=memory)


def numbers_of(extent: Extent, number: int) -> torch.Tensor:
    """Keys that tell extents, layers and tokens apart."""
    shape = torch.Size((SHAPE.num_layers, SHAPE.num_kv_heads, extent.capacity, SHAPE.head_dim))
    return torch.arange(shape.numel()).reshape(shape) + 10_000.0 * number


def fill(extent: Extent, number: int) -> None:
    key = numbers_of(extent, number)
    extent.write(slice(None), 0, key, -key)


def is_filled(extent: Extent, number: int) -> bool:
    expected = numbers_of(extent, number)[1]
    key, value = extent.read(1, 0, extent.capacity)
    return torch.equal(key, expected) and torch.equal(value, -expected)


class Admission(RuleBasedStateMachine):
    """Admission succeeds whenever free blocks, and cached ones it may evict, suffice. What is held stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of()
        self.pool.on_evict = self._evicted
        self.held: list[Extent] = []
        self.cached: list[Extent] = []
        self.numbers: dict[Extent, int] = {}
        self.num_evicted = 0

    def _evicted(self, extent: Extent) -> None:
        self.cached.remove(extent)
        self.num_evicted += extent.num_blocks

    def _take(self, take: Callable[[], Extent], needed: int) -> None:
        available, free = self.pool.available_blocks, self.pool.counts()[BlockState.FREE]
        cached, self.num_evicted = list(self.cached), 0
        if needed > available:
            with pytest.raises(Busy):
                take()
            assert (self.cached, self.num_evicted) == (cached, 0)
            return
        extent = take()
        assert extent.num_blocks == needed
        # Beyond what it must, no more goes than is asked for, and one extent that ends in it.
        largest = max((e.num_blocks for e in cached), default=0)
        assert self.num_evicted <= max(0, needed - free) + needed + 2 * largest
        self.held.append(extent)
        self.numbers[extent] = len(self.numbers)
        fill(extent, self.numbers[extent])

    @rule(num_tokens=st.integers(1, 12 * PAGE), spares=st.booleans())
    def allocate(self, num_tokens: int, spares: bool) -> None:
        if not spares:
            self._take(lambda: self.pool.allocate(num_tokens), self.pool.blocks_for(num_tokens))
            return
        with self.pool.sparing_cache():
            self._take(lambda: self.pool.allocate(num_tokens), self.pool.blocks_for(num_tokens))
        assert self.num_evicted == 0

    @precondition(lambda self: self.held)
    @rule(num_tokens=st.integers(1, 8 * PAGE), which=st.integers(0, 99))
    def open_tail(self, num_tokens: int, which: int) -> None:
        head = self.held[which % len(self.held)]
        first_slot = head.pieces[0].first_slot
        assert first_slot is not None
        if first_slot % PAGE:  # a tail is nobody's head
            return
        needed = self.pool.blocks_for(num_tokens + head.capacity % PAGE)
        assert needed <= self.pool.blocks_to_open(num_tokens)
        self._take(lambda: self.pool.open_tail(num_tokens, head), needed)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), keeps=st.booleans())
    def release(self, which: int, keeps: bool) -> None:
        extent = self.held.pop(which % len(self.held))
        extent.chunk_ids = {b"chunk"} if keeps else set()
        if keeps:
            self.cached.append(extent)
        self.pool.release(extent)

    @precondition(lambda self: self.cached)
    @rule(which=st.integers(0, 99))
    def retain(self, which: int) -> None:
        extent = self.cached.pop(which % len(self.cached))
        self.pool.retain(extent)
        self.held.append(extent)

    @invariant()
    def the_ledger_adds_up(self) -> None:
        self.pool.check_invariants()
        counts = self.pool.counts()
        assert counts[BlockState.REFERENCED] == sum(extent.num_blocks for extent in self.held)
        assert counts[BlockState.CACHED] == sum(extent.num_blocks for extent in self.cached)

    @invariant()
    def nobody_writes_what_another_holds(self) -> None:
        assert all(is_filled(extent, self.numbers[extent]) for extent in (*self.held, *self.cached))


TestAdmission = Admission.TestCase
TestAdmission.settings = settings(
    derandomize=True, deadline=None, max_examples=25, stateful_step_count=30, database=None
)


def in_pieces(pool: Pool) -> list[Extent]:
    """Takes every second page: no two that are free lie side by side."""
    every = [pool.allocate(PAGE) for _ in range(pool.num_blocks)]
    for extent in every[1::2]:
        pool.release(extent)
    return every[::2]


def test_a_pool_that_is_always_full_keeps_its_extents_in_few_pieces() -> None:
    """Prompts that stay cached and tails that go, of 8 to 64 blocks each, least recently used first out."""
    pool, rng = pool_of(2048), random.Random(0)
    tails: list[Extent] = []
    num_pieces, num_blocks = 0, 0
    for number in range(1500):
        extent = pool.allocate(PAGE * rng.randint(8, 64))
        if number > 500:
            num_pieces, num_blocks = num_pieces + len(extent.pieces), num_blocks + extent.num_blocks
        if rng.random() < 0.3:
            tails.append(extent)
        else:
            extent.chunk_ids.add(b"chunk")
            pool.release(extent)
        if len(tails) > 16:
            pool.release(tails.pop(rng.randrange(len(tails))))
    pool.check_invariants()
    assert pool.counts()[BlockState.FREE] < 0.1 * pool.num_blocks
    assert num_blocks / num_pieces > 12


def test_bytes_and_copies_cross_pieces() -> None:
    pool = pool_of()
    in_pieces(pool)
    extent, other = pool.allocate(70), pool.allocate(60)
    assert (len(extent.pieces), len(other.pieces)) == (5, 4)
    fill(extent, 3)
    copy_kv([whole(Run(extent, 3, 60, 7))], other, 7, 67)
    for layer in range(SHAPE.num_layers):
        written = layer_of_run(Run(extent, 3, 60, 0), layer)
        assert layer_of_run(Run(other, 0, 60, 0), layer) == written
        write_layer(other, 1, layer, 59, *(part[: len(part) * 59 // 60] for part in written))
        assert torch.equal(other.read(layer, 1, 60)[1], extent.read(layer, 3, 62)[1])


def _engine(num_blocks: int, device: DeviceSettings | None) -> Engine:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    adapter = ModelAdapter(LlamaForCausalLM(llama_config(**sizes)).eval(), max_context_tokens=1024)
    return Engine(adapter, letters, num_blocks=num_blocks, block_size=PAGE, num_sink_tokens=0, device=device)


def _linked_prompt(engine: Engine, order: Sequence[int]) -> Prompt:
    documents = [engine.chunk(tokens(60 + 9 * i, seed=i)) for i in range(3)]
    return Prompt((Part(tuple(tokens(5))), *(documents[i] for i in order), Part(tuple(tokens(11, seed=4)))))


def test_an_answer_needs_free_blocks_and_not_that_they_lie_side_by_side() -> None:
    host, device = _engine(128, None), _engine(128, DeviceSettings(row_buckets=(1, 2, 4)))
    held = in_pieces(device.pool)
    assert device.pool.counts()[BlockState.FREE] == 64
    prompt, params = Prompt.live(tokens(300)), SamplingParams(max_tokens=40)
    answers, more = ([engine.generate(prompt, params).token_ids for _ in range(2)] for engine in (host, device))
    assert more == answers  # the second behind what the first left, and sealed
    params = SamplingParams(max_tokens=12)
    for order in ([0, 1, 2], [2, 0, 1]):
        linked, found = (
            engine.generate(_linked_prompt(engine, order), params, mode=ReuseMode.LINKED) for engine in (host, device)
        )
        assert found.token_ids == linked.token_ids
        assert found.reuse.sources == linked.reuse.sources
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3)
    samples, drawn = (engine.generate_samples(Prompt.live(tokens(75)), 3, params) for engine in (host, device))
    assert [answer.token_ids for answer in drawn] == [answer.token_ids for answer in samples]
    assert device.decoding.device is not None
    assert device.decoding.device.num_eager_steps == 0
    for extent in held:
        device.pool.release(extent)
    assert_nothing_held(device)
