"""What the paths of a decode node work with."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_decode.config import DecodeConfig
from spolia_decode.prefill_client import PrefillClient
from spolia_decode.prefill_nodes import PrefillNodes
from spolia_engine.core import EngineCore
from spolia_node.store_client import StoreClient
from spolia_worker.chunk_fetch import ChunkFetcher
from spolia_worker.engine_thread import EngineThread
from spolia_worker.publisher import Publisher


@dataclass(frozen=True, slots=True)
class NodeParts:
    """The parts of one decode node, made once at its start."""

    config: DecodeConfig
    core: EngineCore
    thread: EngineThread
    store: StoreClient
    fetcher: ChunkFetcher
    publisher: Publisher
    prefill: PrefillClient
    prefill_nodes: PrefillNodes
