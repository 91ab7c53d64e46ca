"""Messages between this process and that of a baseline: a line of JSON each, and a deadline for every wait."""

from __future__ import annotations

import json
import os
import select
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from spolia_core.errors import DeadlineExceeded, InternalError, Unavailable

MAX_LINE_BYTES = 4096
"""No message comes near it, and a pipe takes as much at once."""


@dataclass(frozen=True, slots=True)
class Begin:
    """What to decode, and with how many of torch's threads. Comes first, and again for other rows of the same model."""

    model: str
    seed: int
    num_rows: int
    prefix_tokens: int
    threads: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Steps of what was begun may be asked for. `weights` is a digest of the model's; `has_kernels` whether ours were
    imported.
    """

    weights: str
    has_kernels: bool


@dataclass(frozen=True, slots=True)
class TakeTurn:
    """Asks for a turn: a step that does not count, and one that does."""


@dataclass(frozen=True, slots=True)
class Took:
    """A turn's milliseconds."""

    ms: float


Message = Begin | Ready | TakeTurn | Took
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (Begin, Ready, TakeTurn, Took)}


class MessagePipe:
    """One end of a pair of pipes. Descriptors are the caller's to close."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._received = b""

    def send(self, message: Message) -> None:
        """Raises `Unavailable` where the other end is gone."""
        try:
            os.write(self._write_fd, encoded(message))
        except BrokenPipeError:
            raise Unavailable("the other process is gone") from None

    def receive(self, timeout_s: float) -> Message:
        """The next message. Raises `DeadlineExceeded`; `Unavailable` where the other end is gone."""
        give_up = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left_s = give_up - time.monotonic()
            if left_s <= 0 or not select.select([self._read_fd], [], [], left_s)[0]:
                raise DeadlineExceeded(f"the other process said nothing for {timeout_s:g} s")
            read = os.read(self._read_fd, MAX_LINE_BYTES)
            if not read:
                raise Unavailable("the other process is gone")
            self._received += read
            if len(self._received) > MAX_LINE_BYTES:
                raise InternalError(f"a message of more than {MAX_LINE_BYTES} bytes")
        line, _, self._received = self._received.partition(b"\n")
        return decoded(line)


def encoded(message: Message) -> bytes:
    """A line, its end included."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decoded(line: bytes) -> Message:
    """Raises `InternalError`, naming what is wrong, for what no message of ours looks like."""
    try:
        found: Any = json.loads(line)
    except ValueError:
        raise InternalError(f"no JSON: {line[:80]!r}") from None
    kind = _KINDS.get(found.pop("kind", "")) if isinstance(found, dict) else None
    if kind is None:
        raise InternalError(f"no message of a kind that is known: {line[:80]!r}")
    expected = {field.name: str(field.type) for field in fields(kind)}
    given = {name: type(value).__name__ for name, value in found.items()}
    if given != expected:
        raise InternalError(f"{kind.__name__} has {expected}; got {given}")
    return kind(**found)
