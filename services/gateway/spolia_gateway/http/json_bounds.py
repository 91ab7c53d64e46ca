"""What a body of JSON may hold, counted before it is parsed.

The parser and the validator hold the interpreter from the first value to the last, on whatever thread they run: 16 MB
of numbers would stop every stream of the gateway for a second and more. Counting goes over the bytes a few times, each
as fast as memory. Of text only the longest counts: the parser copies it, and so does each step behind the parser, so
that what no prompt may be as long as is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass

from spolia_core.errors import InvalidRequest
from spolia_gateway.http.request_body import BodyRefused

SMALL_BYTES = 64 << 10
"""Bodies up to this are parsed at once: whatever is in them takes less than 40 ms."""
MAX_TEXTS = 1 << 15
MAX_CONTAINERS = 5000
"""Lists and objects, as many as the most documents that a request may have and what stands around them. A message of a
chat takes 2 … 15 us."""
MIN_TEXT_BYTES = 1 << 20
"""Shorter texts are left to who knows their field and its limit."""
MOST_SAVED = 5
"""Bytes that a text is shorter by than what is written, for each backslash at most: \\u0041 is one letter."""


@dataclass(frozen=True, slots=True)
class JsonBounds:
    """Of one body, in counts."""

    max_values: int
    """Values, whatever they are: 0.1 us each, as a list of token ids."""
    max_escapes: int
    """Backslashes: the parser reads what has none ten times as fast."""
    max_text_bytes: int
    """Of one string."""

    @classmethod
    def of(cls, max_body_bytes: int, max_prompt_bytes: int) -> JsonBounds:
        """Those beside limits in bytes: 262,144 token ids and 4 Mi escapes in 32 MiB."""
        return cls(
            max_values=max_body_bytes >> 7,
            max_escapes=max_body_bytes >> 3,
            max_text_bytes=max(max_prompt_bytes, MIN_TEXT_BYTES),
        )

    def check(self, body: bytes) -> None:
        """Raises `InvalidRequest` for what holds more, `BodyRefused` for what is in another encoding than JSON's.

        Leaves it to the parser whether the rest is JSON.
        """
        if b"\0" in body:  # UTF-16 and UTF-32, which Python's parser would read
            raise BodyRefused(400, "the body is no JSON: it is no text in UTF-8", "invalid_json")
        num_escapes = body.count(b"\\")
        _check(num_escapes, self.max_escapes, "escapes (\\n, \\u00e9)", "write text in UTF-8")
        plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if num_escapes else body
        _check(plain.count(b'"') // 2, MAX_TEXTS, "strings", "send less at once")
        pieces = plain.split(b'"')
        self._check_texts(pieces[1::2])  # between two quotes is text
        outside = b"".join(pieces[::2])
        num_containers = outside.count(b"[") + outside.count(b"{")
        _check(num_containers, MAX_CONTAINERS, "lists and objects", "send less at once")
        _check(outside.count(b",") + num_containers, self.max_values, "values", "send long prompts as text")

    def _check_texts(self, texts: list[bytes]) -> None:
        longest = max(texts, key=len, default=b"")
        num_bytes = len(longest) - MOST_SAVED * longest.count(b"\\")
        if num_bytes > self.max_text_bytes:
            raise InvalidRequest(
                f"the body has a text of {num_bytes} bytes; at most {self.max_text_bytes} are taken",
                limit=f"{self.max_text_bytes} bytes",
                actual=f"{num_bytes} bytes",
            )


def _check(count: int, limit: int, what: str, remedy: str) -> None:
    if count > limit:
        raise InvalidRequest(
            f"the body has {count} {what}; at most {limit} are read: {remedy}",
            limit=f"{limit} {what}",
            actual=str(count),
        )
