"""How a node with an engine describes itself to the directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spolia.v1.directory_pb2 import NodeLoad, NodeRecord, NodeRole, ServedModel
from spolia.version import __version__
from spolia_core.link_terms import LinkTerms
from spolia_core.reuse import ChunkKind
from spolia_engine.core import EngineCore
from spolia_engine.extent import BlockState
from spolia_node.server import NodeServer
from spolia_worker.config import WorkerConfig

MAX_HELD_IDS = 4096
"""Ids of resident chunks in a record, of all kinds together.

34 bytes each make 139 KB, sent at every heartbeat (a third of a lease apart, one second by default) and passed on to
every watcher. As prefix chunks they stand for half a million tokens.
"""


def model_name(config: WorkerConfig) -> str:
    """The name users ask for."""
    return config.model_name or Path(config.model).resolve().name


def served_model(config: WorkerConfig, core: EngineCore, terms: LinkTerms) -> ServedModel:
    """The model as the directory lists it."""
    adapter = core.adapter
    return ServedModel(
        name=model_name(config),
        fingerprint=adapter.fingerprint,
        max_context_tokens=adapter.max_context_tokens,
        vocab_size=adapter.vocab_size,
        supports_linked=adapter.support.linked,
        compute_dtype=adapter.compute_dtype,
        num_sink_tokens=core.recipe.num_sink_tokens,
        profile=terms.profile,
        policy=terms.policy.name,
        linked_refusal=adapter.support.linked_refusal or terms.refusal,
    )


def load_of(core: EngineCore, *, num_running: int, num_waiting: int, queued_tokens: int) -> NodeLoad:
    """How busy a node is, its ledger included."""
    counts = core.pool.counts()
    return NodeLoad(
        num_running=num_running,
        num_waiting=num_waiting,
        queued_tokens=queued_tokens,
        total_blocks=core.pool.num_blocks,
        available_blocks=counts[BlockState.FREE] + counts[BlockState.CACHED],
        referenced_blocks=counts[BlockState.REFERENCED],
        cached_blocks=counts[BlockState.CACHED],
        in_transfer_blocks=counts[BlockState.IN_TRANSFER],
        lent_blocks=counts[BlockState.LENT],
    )


def shares_of(first: Sequence[bytes], second: Sequence[bytes], limit: int) -> tuple[Sequence[bytes], Sequence[bytes]]:
    """The heads of two lists, `limit` in all: half for each, and what one leaves free for the other."""
    half = limit // 2
    room = max(half, limit - len(second))
    kept = first[:room]
    return kept, second[: limit - len(kept)]


def node_record(
    server: NodeServer,
    role: NodeRole.ValueType,
    config: WorkerConfig,
    core: EngineCore,
    terms: LinkTerms,
    load: NodeLoad,
) -> NodeRecord:
    """The whole record: what every heartbeat carries."""
    resident = core.resident
    chunks, prefixes = shares_of(resident.held(ChunkKind.LOCAL), resident.held(ChunkKind.PREFIX), MAX_HELD_IDS)
    return NodeRecord(
        node_id=server.node_id,
        role=role,
        address=server.address,
        model=served_model(config, core, terms),
        load=load,
        held_chunks=chunks,
        held_prefixes=prefixes,
        draining=server.leaving,
        version=__version__,
        metrics_address=server.metrics_address,
    )
