"""What a prompt is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from spolia.argument_checks import checked_items


@dataclass(frozen=True, slots=True)
class Document:
    """Text whose KV is worth keeping: reused in any order, at any position of later prompts.

    `name` is echoed in progress and errors; it is no part of the document's identity.
    """

    text: str
    name: str = ""


@dataclass(frozen=True, slots=True, init=False)
class TokenIds:
    """Token ids taken as they are: for callers who tokenize themselves, and for the next turn of a chat.

    Raises `InvalidRequest` for what cannot be gone through; the ids are looked at when they are sent.
    """

    ids: tuple[int, ...]

    def __init__(self, ids: Iterable[int]) -> None:
        given = checked_items(ids, "token_ids", "an iterable of int")
        object.__setattr__(self, "ids", tuple(given))


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat. `role` is what the model's template knows: "system", "user", "assistant"."""

    role: str
    content: str


Part: TypeAlias = str | Document | TokenIds
"""One piece of a prompt, tokenized on its own. A `str` is computed for its request and not kept as a document."""

Parts: TypeAlias = Part | Iterable[Part]
"""A prompt, first piece to last. A lone part is a prompt of one."""

Documents: TypeAlias = str | Document | Iterable[str | Document]
"""Documents to warm or to forget. A lone one is a list of one; a `str` is a document without a name."""
