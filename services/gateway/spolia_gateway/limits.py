"""What one request may ask for, checked before anything is tokenized or held."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from spolia_core.errors import ContextTooLong, InvalidRequest

MAX_REQUEST_ID_BYTES = 128
MAX_CACHE_SALT_BYTES = 256
TOKEN_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds on one request. Texts count their UTF-8 bytes, token ids four bytes each."""

    max_prompt_bytes: int = 4 << 20
    max_documents: int = 1024
    max_parts: int = 4096
    max_chunks: int = 4096

    def check_count(self, num: int, limit: int, field: str) -> None:
        """Raises `InvalidRequest` unless 1 ≤ `num` ≤ `limit`."""
        if num == 0:
            raise InvalidRequest(f"{field} is empty", field=field, limit="≥ 1", actual="0")
        if num > limit:
            raise InvalidRequest(
                f"{field} has {num} entries; at most {limit} are taken", field=field, limit=str(limit), actual=str(num)
            )

    def check_documents(self, num: int) -> None:
        """Raises `InvalidRequest` for more than `max_documents`; none are well, where a request may go without."""
        if num > 0:
            self.check_count(num, self.max_documents, "documents")

    def check_chunks(self, num: int) -> None:
        """Raises `InvalidRequest` when documents were cut into more than `max_chunks`."""
        if num > self.max_chunks:
            raise InvalidRequest(
                f"splitting cuts the documents into more than {self.max_chunks} chunks, the most a request may have; "
                "use the splitter sentence, a larger splitting.max_tokens, or fewer documents",
                field="splitting",
                limit=f"{self.max_chunks} chunks",
                actual=f"≥ {num} chunks",
            )

    def check_bytes(self, sizes: Sequence[int], field: str) -> None:
        """Raises `InvalidRequest` when `sizes` add up to more than `max_prompt_bytes`."""
        total = sum(sizes)
        if total > self.max_prompt_bytes:
            raise InvalidRequest(
                f"{field} holds {total} bytes; at most {self.max_prompt_bytes} are taken",
                field=field,
                limit=f"{self.max_prompt_bytes} bytes",
                actual=f"{total} bytes",
            )


def check_text(text: str, field: str) -> int:
    """Its bytes. Raises `InvalidRequest` when `text` is empty."""
    if not text:
        raise InvalidRequest(f"{field} is empty", field=field, limit="≥ 1 byte", actual="0 bytes")
    return len(text.encode())


def check_cache_salt(salt: str) -> None:
    """Raises `InvalidRequest` for a salt that is too long."""
    size = len(salt.encode())
    if size > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest(
            f"cache_salt has {size} bytes; at most {MAX_CACHE_SALT_BYTES} are taken",
            field="cache_salt",
            limit=f"{MAX_CACHE_SALT_BYTES} bytes",
            actual=f"{size} bytes",
        )


def check_may_fit(num_bytes: int, field: str, max_context_tokens: int, max_bytes_per_token: int | None) -> None:
    """Raises `InvalidRequest` when so much text has more tokens than the context however it is encoded.

    Spares the encoding. Passes what only counting tokens can tell, and all where the tokenizer has no such bound.
    """
    if max_bytes_per_token is None or num_bytes <= max_context_tokens * max_bytes_per_token:
        return
    raise ContextTooLong(
        f"{field} holds {num_bytes} bytes of text; this model's context of {max_context_tokens} tokens holds "
        f"{max_context_tokens * max_bytes_per_token} bytes at most",
        field=field,
        limit=f"{max_context_tokens * max_bytes_per_token} bytes",
        actual=f"{num_bytes} bytes",
    )


def request_id_of(given: str) -> str:
    """The request's id, made here when none was given.

    Raises `InvalidRequest` unless it is at most 128 bytes of printable ASCII: it travels in headers and log lines.
    """
    if not given:
        return secrets.token_hex(16)
    if len(given) > MAX_REQUEST_ID_BYTES:
        raise InvalidRequest(
            f"request_id has {len(given)} characters; at most {MAX_REQUEST_ID_BYTES} are taken",
            field="request_id",
            limit=f"{MAX_REQUEST_ID_BYTES} bytes",
            actual=f"{len(given.encode())} bytes",
        )
    if not (given.isascii() and given.isprintable()):
        raise InvalidRequest(
            f"request_id {given!r} is not printable ASCII", field="request_id", limit="printable ASCII", actual=given
        )
    return given
