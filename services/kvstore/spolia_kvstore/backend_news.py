"""Who is told what changed in a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spolia_kvstore.objects import ObjectKey


class BackendNews:
    """The part of a `Backend` that tells: what each of the three means is said there. Listeners must not raise."""

    def __init__(self) -> None:
        self._claims_ended: list[Callable[[Sequence[ObjectKey]], None]] = []
        self._members_changed: list[Callable[[], None]] = []
        self._reconnected: list[Callable[[], None]] = []

    def on_claims_ended(self, callback: Callable[[Sequence[ObjectKey]], None]) -> None:
        """`callback` is told from now on."""
        self._claims_ended.append(callback)

    def on_members_changed(self, callback: Callable[[], None]) -> None:
        """`callback` is told from now on."""
        self._members_changed.append(callback)

    def on_reconnected(self, callback: Callable[[], None]) -> None:
        """`callback` is told from now on."""
        self._reconnected.append(callback)

    def tell_claims_ended(self, keys: Sequence[ObjectKey]) -> None:
        """Tells of claims that ended; nobody, where there are none."""
        for callback in self._claims_ended if keys else ():
            callback(keys)

    def tell_members_changed(self) -> None:
        """Tells that members changed."""
        for callback in self._members_changed:
            callback()

    def tell_reconnected(self) -> None:
        """Tells that the backend can be reached again."""
        for callback in self._reconnected:
            callback()
