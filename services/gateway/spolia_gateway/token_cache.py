"""Recently encoded texts, bounded by the bytes they take."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from threading import Lock

ENTRY_OVERHEAD_BYTES = 256
"""What an entry costs besides its numbers: key, array header, dict slot; rounded up."""


class TokenCache:
    """A least-recently-used map from key to token ids, or to where tokens begin. Thread-safe.

    Arrays are shared: do not change them.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, array[int]] = OrderedDict()
        self._used_bytes = 0
        self._lock = Lock()

    @property
    def used_bytes(self) -> int:
        """Bytes accounted for; never more than the bound."""
        return self._used_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> array[int] | None:
        """The ids under `key`, which become the most recently used."""
        with self._lock:
            ids = self._entries.get(key)
            if ids is not None:
                self._entries.move_to_end(key)
            return ids

    def put(self, key: bytes, ids: array[int]) -> None:
        """Keeps `ids`, dropping the least recently used until all fit. Ids larger than the bound are not kept."""
        size = _size(ids)
        if size > self._max_bytes:
            return
        with self._lock:
            replaced = self._entries.pop(key, None)
            self._used_bytes += size - (0 if replaced is None else _size(replaced))
            self._entries[key] = ids
            while self._used_bytes > self._max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self._used_bytes -= _size(dropped)


def _size(ids: array[int]) -> int:
    return len(ids) * ids.itemsize + ENTRY_OVERHEAD_BYTES
