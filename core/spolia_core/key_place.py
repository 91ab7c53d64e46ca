"""Where a book of API keys lies: in a file, or in Redis for gateways on several machines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from spolia_core.errors import InvalidRequest
from spolia_core.key_book import KeyBook
from spolia_core.key_file import KeyFile

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class KeyPlace(Protocol):
    """One place. Calls block, for a few seconds at most."""

    @property
    def name(self) -> str:
        """For messages; without a password."""

    def read(self) -> bytes:
        """What is there, for `KeyBook.from_bytes`. Raises `InvalidRequest` for no file, `Unavailable` for no Redis."""

    def change(self, change: Callable[[KeyBook], KeyBook]) -> None:
        """Replaces the book by what `change` makes of it, whole, and with no other change lost. Makes what is missing.

        Raises as `read`, and what `change` raises; nothing is replaced then.
        """


def key_place(text: str) -> KeyPlace:
    """The place that a setting names: a path, or `redis://`, `rediss://` or `unix://` and a Redis' address."""
    if not text:
        raise InvalidRequest("keys must be a file or the URL of a Redis", field="keys")
    if not text.startswith(REDIS_SCHEMES):
        return KeyFile(Path(text))
    try:
        from spolia_core.key_redis import KeysInRedis  # the library is an extra's
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"keys in Redis need {error.name}; install the extra: pip install 'spolia[gateway]'", field="keys"
        ) from error
    return KeysInRedis(text)
