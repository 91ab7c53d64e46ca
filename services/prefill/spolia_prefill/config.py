"""Settings of a prefill node."""

from __future__ import annotations

from dataclasses import dataclass

from spolia_node.config import at_least, setting
from spolia_worker.config import WorkerConfig


@dataclass(frozen=True)
class PrefillConfig(WorkerConfig):
    """What a prefill node may be told."""

    max_running: int = setting(64, "Streams worked on or waiting at once; more are refused.", check=at_least(1))
    ack_lease_s: float = setting(
        10.0, "How long live KV waits for the next acknowledgement before it is freed.", check=at_least(0.1)
    )
