"""What a store counts since its start, for stats and metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from spolia_core.reuse import MissReason
from spolia_kvstore.objects import Tier


@dataclass(slots=True)
class Counters:
    """Counts since the start."""

    hits: Counter[Tier] = field(default_factory=Counter)
    misses: Counter[MissReason] = field(default_factory=Counter)
    digest_failures: int = 0
    puts: int = 0
    read_bytes: Counter[Tier] = field(default_factory=Counter)
