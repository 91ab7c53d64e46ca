"""Chunk ids as people type them: their first hex digits."""

from __future__ import annotations

import string
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from spolia.argument_checks import wrong_type
from spolia.store_results import StoredObject
from spolia_core.errors import InvalidRequest, NotFound

ID_DIGITS = 64
MIN_DIGITS = 4
"""Fewer name nothing: with a hundred objects, most of such prefixes have several."""
MAX_SHOWN = 5
MAX_QUESTIONS = 32


def checked_prefix(prefix: object, *, min_digits: int = 0) -> str:
    """`prefix`, hex digits of an id, in lower case. Raises `InvalidRequest` for anything else."""
    if not isinstance(prefix, str):
        raise wrong_type(prefix, "id", "str, hex digits")
    if not min_digits <= len(prefix) <= ID_DIGITS or not set(prefix) <= set(string.hexdigits):
        limit = f"{min_digits} … {ID_DIGITS} hex digits"
        raise InvalidRequest(f"an id is given by {limit}, got {prefix!r}", field="id", limit=limit, actual=prefix)
    return prefix.lower()


def prefixes_to_ask(prefixes: Sequence[str]) -> list[str]:
    """What to ask stores for, so that they list all that `prefixes` name: each; of many, fewer of their digits."""
    for num_digits in range(ID_DIGITS, 0, -2):
        distinct = list(dict.fromkeys(prefix[:num_digits] for prefix in prefixes))
        if len(distinct) <= MAX_QUESTIONS:
            return distinct
    return [""]


def whole_bytes(prefix: str) -> bytes:
    """The bytes that `prefix` names in full; an odd last digit is left to the caller."""
    return bytes.fromhex(prefix[: len(prefix) // 2 * 2])


class ById:
    """Objects in the order of their ids' digits, so that many are found in little time."""

    def __init__(self, objects: Iterable[StoredObject]) -> None:
        self._objects = sorted(objects, key=lambda found: found.chunk_id)
        self._ids = [found.chunk_id.hex() for found in self._objects]

    def matching(self, prefix: str) -> list[StoredObject]:
        """Those whose id begins with `prefix`."""
        return self._objects[bisect_left(self._ids, prefix) : bisect_left(self._ids, prefix + "g")]


def the_one(objects: ById, prefix: str, *, whole: bool = True) -> StoredObject:
    """The object that `prefix` names.

    Raises `NotFound` when there is none, `InvalidRequest` with what was found when there are several. Without `whole`,
    some stores did not answer, which the error then says.
    """
    found = objects.matching(prefix)
    if not found:
        where = "no store holds" if whole else "none of the stores that answered holds"
        raise NotFound(f"{where} an object {prefix}", field="id", actual=prefix)
    if len(found) == 1:
        return found[0]
    if len({one.chunk_id for one in found}) == 1:
        tenants = ", ".join(one.tenant_id for one in found)
        message = f"object {found[0].chunk_id.hex()} is stored for tenants {tenants}; name one of them"
        raise InvalidRequest(message, field="tenant", actual=tenants)
    shown = ", ".join(dict.fromkeys(one.chunk_id.hex() for one in found[:MAX_SHOWN]))
    more = f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    raise InvalidRequest(
        f"{prefix} names {len(found)} objects: {shown}{more}", field="id", limit="one object", actual=prefix
    )
