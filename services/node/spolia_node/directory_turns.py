"""Where the directory is looked for, and how long to wait between tries."""

from __future__ import annotations

from spolia_node.addresses import addresses_in

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


class Backoff:
    """Seconds to wait between tries: doubling from the first to the longest, until `reset`."""

    def __init__(self) -> None:
        self._next_s = FIRST_BACKOFF_S

    def reset(self) -> None:
        """Starts over: a try went well."""
        self._next_s = FIRST_BACKOFF_S

    def next_s(self) -> float:
        """How long to wait now."""
        wait_s = self._next_s
        self._next_s = min(MAX_BACKOFF_S, wait_s * 2)
        return wait_s


class DirectoryTurns:
    """The addresses of a directory, one after another: the next is tried at once, a whole round after a wait.

    One that answers is kept until it fails. With a single address every try is a round.
    """

    def __init__(self, addresses: str) -> None:
        """`addresses` as the setting `directory` writes them; at least one."""
        self._addresses = addresses_in(addresses)
        self._turn = 0
        self._backoff = Backoff()

    @property
    def address(self) -> str:
        """Whose turn it is."""
        return self._addresses[self._turn % len(self._addresses)]

    def answered(self) -> None:
        """The present one answers. Waits are short again, but never left out: it may fail again at once."""
        self._backoff.reset()

    def failed(self) -> float:
        """Passes the turn on; seconds to wait before using it."""
        self._turn += 1
        return 0.0 if self._turn % len(self._addresses) else self._backoff.next_s()
