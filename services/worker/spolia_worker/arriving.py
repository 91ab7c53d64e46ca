"""A local chunk on its way into the pool, to be attended layer by layer as it comes.

    store ──frames──▶ event loop ──copy──▶ extent: layer l is whole, its digest matches ──▶ a link pass reads layer l

An object lies layer after layer (chunk object, format 1), so the first layers can be used while the last are on the
wire. The extent stays *in transfer* until all of it has come; what reads it holds a reference of its own.
"""

from __future__ import annotations

import threading

from spolia.v1.common_pb2 import ObjectInfo
from spolia_core.chunk_object import ChunkHead, ChunkMeta, check_layer, head_bytes, parse_head
from spolia_core.errors import DataCorrupt, NotSupported, SpoliaError, Unavailable
from spolia_core.reuse import ChunkKind
from spolia_engine.core import EngineCore
from spolia_engine.layer_filling import LayerFilling
from spolia_engine.run import Run

LENGTH_BYTES = 8
"""Where an object says how long its head is."""


class ChunkLost(SpoliaError):
    """A chunk that a pass was reading will not come: what was computed with it is worth nothing. Get it elsewhere."""


class ArrivingChunk:
    """One chunk and its extent. Written from the event loop, asked from the engine's thread.

    Making one allocates; raises `Busy` when the pool has no room. Owns one reference on the extent until `release`.
    """

    def __init__(self, core: EngineCore, chunk_id: bytes, num_tokens: int) -> None:
        self.chunk_id = chunk_id
        self.run = Run(core.pool.allocate(num_tokens, in_transfer=True), 0, num_tokens, 0)
        self._core = core
        self._expected = core.meta(chunk_id, ChunkKind.LOCAL, self.run)
        self._start = bytearray()
        self._head: ChunkHead | None = None
        self._filling: LayerFilling | None = None
        self._num_layers = 0
        self._was_read = False
        self._lock = threading.Lock()
        self._failure: SpoliaError | None = None

    def has(self, layer: int) -> bool:
        """Whether a layer may be read. Raises `ChunkLost` once it is known that not all will come."""
        with self._lock:
            if self._failure is not None:
                raise ChunkLost(f"chunk {self.chunk_id.hex()} did not arrive: {self._failure.message}")
            is_here = layer < self._num_layers
            self._was_read |= is_here
            return is_here

    @property
    def is_complete(self) -> bool:
        """Whether every layer is here."""
        return self._failure is None and self._num_layers == self._expected.shape.num_layers

    @property
    def failure(self) -> SpoliaError | None:
        """Why it will not come."""
        return self._failure

    def take(self, info: ObjectInfo, offset: int, data: memoryview) -> bool:
        """Takes the object's next bytes over; whether a layer became whole with them. Fit for a Get's `OnBytes`.

        Whatever is wrong with the object fails the chunk. Another replica starts it anew, unless layers of the first
        were read already: bytes of two are never joined.
        """
        if self._failure is not None:
            return False
        if offset == 0 and not data:
            self._begin_anew()
            return False
        try:
            return self._take(data, info.size_bytes)
        except (DataCorrupt, NotSupported) as error:
            self.fail(error)
            return False

    def fail(self, error: SpoliaError) -> None:
        """It will not come."""
        with self._lock:
            self._failure = self._failure or error

    def arrive(self) -> Run:
        """Every layer is here: registers the chunk. The run shares the reference."""
        assert self.is_complete, "a chunk is registered whole or not at all"
        run = self.run
        self._core.pool.arrive(run.extent)
        return self._core.adopt(
            run.extent, 0, run.num_tokens, rope_base=0, chunk_id=self.chunk_id, kind=ChunkKind.LOCAL
        )

    def release(self) -> None:
        """Gives its reference back; nothing may be written any more."""
        self._core.pool.release(self.run.extent)

    def _begin_anew(self) -> None:
        """An object begins: the first, or another replica."""
        with self._lock:
            self._start, self._head, self._filling = bytearray(), None, None
            if self._was_read:
                self._failure = Unavailable("the store it was read from broke off")
            self._num_layers = 0

    def _take(self, data: memoryview, total_bytes: int) -> bool:
        if self._head is None:
            data = self._take_head(data, total_bytes)
        before = self._num_layers
        while data and self._head is not None:
            filling = self._filling or self._next_layer()
            data = data[filling.take(data) :]
            if filling.is_full:
                check_layer(self._head, self._num_layers, filling.digest)
                filling.finish()
                self._filling = None
                self._num_layers += 1  # last: the engine's thread may read the layer from here on
        return self._num_layers > before

    def _take_head(self, data: memoryview, total_bytes: int) -> memoryview:
        """Collects the head, and opens it once it is all here; what of `data` comes behind it.

        Raises `DataCorrupt` or `NotSupported` for another object than is expected.
        """
        start = self._start
        start += data
        if len(start) < LENGTH_BYTES:
            return data[:0]
        size = head_bytes(start, total_bytes)
        if len(start) < size:
            return data[:0]
        head = parse_head(start[:size], total_bytes)
        self._check(head.meta)
        self._head, self._start = head, bytearray()
        return data[len(data) - (len(start) - size) :]

    def _next_layer(self) -> LayerFilling:
        if self._num_layers == self._expected.shape.num_layers:
            raise DataCorrupt("the object goes on behind its last layer", field="size")
        self._filling = LayerFilling(self.run.extent, self._num_layers, self.run.num_tokens)
        return self._filling

    def _check(self, meta: ChunkMeta) -> None:
        if meta != self._expected:
            raise DataCorrupt(f"object is {meta}, not {self._expected}")
