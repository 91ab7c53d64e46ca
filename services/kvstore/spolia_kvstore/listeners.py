"""Who is told of what came and went on a tier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spolia_kvstore.objects import ObjectRecord, Tier


@dataclass(slots=True)
class Listeners:
    """Told, at once, of what came and went on a tier. They must not raise.

    The flag: no other tier has the object, so it is new here, or gone.
    """

    added: Callable[[ObjectRecord, Tier, bool], None] = lambda record, tier, is_new: None
    removed: Callable[[ObjectRecord, Tier, bool], None] = lambda record, tier, is_gone: None
