"""Live KV on its way to a decode node, slice by slice and layer by layer, held until acknowledged."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from spolia.v1.common_pb2 import Frame
from spolia.v1.prefill_pb2 import LayerFrame, LiveKvHeader, PrefillResponse
from spolia_core.chunk_object import KvShape
from spolia_core.digests import frames
from spolia_core.errors import Cancelled, InvalidRequest, Unavailable
from spolia_engine.context import release_runs
from spolia_engine.kv_bytes import layer_of_run
from spolia_engine.pool import Pool
from spolia_engine.run import Run


class Acknowledgements:
    """Which layers of which slices the other side has. Fed by the stream's reader, awaited by its writer."""

    def __init__(self, lease_s: float) -> None:
        self._waiting: set[tuple[int, int]] | None = None
        self._lease_s = lease_s
        self._changed = asyncio.Event()

    def expect(self, num_slices: int, num_layers: int) -> None:
        """Says what will be sent."""
        self._waiting = set(product(range(num_slices), range(num_layers)))

    def acknowledge(self, slice_index: int, layer: int) -> None:
        """A layer of a slice has arrived. Raises `InvalidRequest` for one that does not exist or was acknowledged."""
        if (slice_index, layer) not in (self._waiting or ()):
            raise InvalidRequest(
                f"layer {layer} of slice {slice_index} is not waiting to be acknowledged",
                field="ack.layer",
                actual=f"{layer} of slice {slice_index}",
            )
        assert self._waiting is not None
        self._waiting.discard((slice_index, layer))
        self._changed.set()

    @property
    def complete(self) -> bool:
        """Whether something was to be acknowledged, and all of it is."""
        return self._waiting is not None and not self._waiting

    async def wait_all(self) -> None:
        """Returns when everything is acknowledged. Raises `Unavailable` when a lease passes without a new one."""
        while self._waiting:
            self._changed.clear()
            try:
                # Not wait_for, which before Python 3.12 drops a cancel that comes with the event.
                async with asyncio.timeout(self._lease_s):
                    await self._changed.wait()
            except TimeoutError:
                raise Unavailable(
                    f"{len(self._waiting)} layers were not acknowledged within {self._lease_s} s; their KV is freed",
                    field="ack",
                    limit=f"{self._lease_s} s",
                ) from None


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of a slice that is complete. The stream holds a reference on each run."""

    layer: int
    runs: Sequence[Run]


class LayerStream:
    """Sends layers as the engine finishes them. Made in the event loop, told by the engine's thread.

    The first slice is what is here already, where there is any; it is sent before anything is computed.
    """

    def __init__(
        self, pool: Pool, prefix: Sequence[Run], num_tokens: int, first_position: int, slice_tokens: int | None
    ) -> None:
        """Sends what stands at `first_position` and behind. `prefix`: what is here of a context of `num_tokens`, held
        by the caller until the pass begins; the pass computes the rest. `slice_tokens`: rows of its slices; None: all
        is sent as one slice.
        """
        self._pool = pool
        self._shape = pool.shape
        self._first = first_position
        self._num_tokens = num_tokens
        self._in_slices = slice_tokens is not None
        self._here = _from_position(prefix, first_position)
        num_cached = sum(run.num_tokens for run in prefix)
        self.slice_tokens = _lengths(first_position, num_cached, num_tokens, slice_tokens)
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._done: deque[_Layer] = deque()
        self._came = asyncio.Event()
        self._closed = False
        if self._in_slices and self._here:
            for layer in range(self._shape.num_layers):
                self._layer_done(layer, self._here)

    @property
    def num_slices(self) -> int:
        """Slices it sends."""
        return len(self.slice_tokens)

    def close(self) -> None:
        """Nobody takes layers any more; the pass ends at its next one."""
        with self._lock:
            self._closed = True
            left = [run for done in self._done for run in done.runs]
            self._done.clear()
        release_runs(self._pool, left)

    def layer_done(self, run: Run, layer: int) -> None:
        """The pass has computed a layer of a slice, `run`. Engine's thread. Raises `Cancelled` once it is closed."""
        is_last = run.rope_base + run.num_tokens == self._num_tokens
        if self._in_slices:
            self._layer_done(layer, _from_position([run], self._first))
        elif is_last:
            rows = Run(run.extent, 0, run.start + run.num_tokens, run.rope_base - run.start)
            self._layer_done(layer, [*self._here, *_from_position([rows], self._first)])
        else:
            self._layer_done(layer, [])

    def _layer_done(self, layer: int, runs: Sequence[Run]) -> None:
        """A layer of the next slice is complete; `runs` together hold its tokens in order. Nothing is sent of none."""
        with self._lock:
            if self._closed:
                raise Cancelled(f"nobody waits for layer {layer}")
            for run in runs:  # the pass may fail and give its memory back while they are being sent
                self._pool.retain(run.extent)
            if runs:
                self._done.append(_Layer(layer, runs))
        self._loop.call_soon_threadsafe(self._came.set)

    def header(self) -> PrefillResponse:
        """What goes before the first layer."""
        shape = self._shape
        return PrefillResponse(
            live_header=LiveKvHeader(
                num_layers=shape.num_layers,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                v_dim=shape.v_dim,
                dtype=shape.dtype,
                first_position=self._first,
                num_tokens=self._num_tokens - self._first,
                slice_tokens=self.slice_tokens if self.num_slices > 1 else (),
            )
        )

    async def frames(self, working: asyncio.Future[Any]) -> AsyncIterator[PrefillResponse]:
        """Every layer's frames, slice by slice, while `working` computes them; raises what `working` raises."""
        for index, num_tokens in enumerate(self.slice_tokens):
            for layer in range(self._shape.num_layers):
                data = self._take_bytes(await self._next(working), layer, num_tokens)
                for offset, piece, piece_digest in frames(data):
                    frame = Frame(offset=offset, data=piece, digest=piece_digest)
                    yield PrefillResponse(layer_frame=LayerFrame(layer=layer, frame=frame, slice=index))

    def _take_bytes(self, done: _Layer, layer: int, num_tokens: int) -> bytes:
        try:
            assert done.layer == layer, (done.layer, layer)
            return layer_bytes(done.runs, layer, self._shape, num_tokens)
        finally:
            release_runs(self._pool, done.runs)

    async def _next(self, working: asyncio.Future[Any]) -> _Layer:
        while True:
            with self._lock:
                if self._done:
                    return self._done.popleft()
                self._came.clear()
            coming = asyncio.ensure_future(self._came.wait())
            try:
                waited: set[asyncio.Future[Any]] = {coming, working}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                coming.cancel()
            if working.done():
                working.result()  # raises when the pass failed; else the notice of its last layer came before
                assert self._done, "the pass ended before its last layer"


def _lengths(first: int, num_cached: int, num_tokens: int, slice_tokens: int | None) -> tuple[int, ...]:
    """Tokens of each slice that is sent, `first` … `num_tokens`: those that are here, then each slice's of the pass."""
    if slice_tokens is None:
        return (num_tokens - first,)
    ends = [num_cached, *range(num_cached + slice_tokens, num_tokens, slice_tokens), num_tokens]
    ends = [first, *(end for end in ends if end > first)]
    return tuple(end - start for start, end in pairwise(ends))


def _from_position(runs: Sequence[Run], position: int) -> list[Run]:
    """What `runs`, absolute and without gaps, hold from `position` on."""
    found: list[Run] = []
    for run in runs:
        skipped = max(0, position - run.rope_base)
        if skipped < run.num_tokens:
            found.append(Run(run.extent, run.start + skipped, run.num_tokens - skipped, run.rope_base + skipped))
    return found


def layer_bytes(runs: Sequence[Run], layer: int, shape: KvShape, num_tokens: int) -> bytes:
    """K then V of one layer over consecutive runs, each [num_kv_heads, num_tokens, width]."""
    parts = [layer_of_run(run, layer) for run in runs]
    keys = _join_heads([key for key, _ in parts], shape.num_kv_heads)
    values = _join_heads([value for _, value in parts], shape.num_kv_heads)
    assert len(keys) == shape.key_bytes(num_tokens), (len(keys), num_tokens)
    return keys + values


def _join_heads(pieces: Sequence[bytes], num_heads: int) -> bytes:
    """Joins [num_heads, tokens_i, width] pieces along tokens."""
    if len(pieces) == 1:
        return pieces[0]
    sizes = [len(piece) // num_heads for piece in pieces]
    return b"".join(
        piece[head * size : (head + 1) * size]
        for head in range(num_heads)
        for piece, size in zip(pieces, sizes, strict=True)
    )
