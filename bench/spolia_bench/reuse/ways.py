"""The ways a prompt is asked, each with where its KV must come from: a row that took another path is no row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spolia import Result, ReuseMode, TokenSource


class KvSource(Enum):
    """Where reused KV was before the request."""

    NONE = "none"
    PREFIX = "device, exact prefix"
    COMPILED = "compiled for the request"
    DEVICE = "device"
    HOST = "store RAM, gRPC"
    DISK = "store disk, gRPC"


@dataclass(frozen=True, slots=True)
class Way:
    """A row: `name` stands in figures."""

    name: str
    mode: ReuseMode
    kv_source: KvSource


FULL = Way("full", ReuseMode.EXACT, KvSource.NONE)
PREFIX = Way("prefix", ReuseMode.EXACT, KvSource.PREFIX)
LINKED_COLD = Way("linked_cold", ReuseMode.LINKED, KvSource.COMPILED)
LINKED = Way("linked", ReuseMode.LINKED, KvSource.DEVICE)
LINKED_REMOTE = Way("linked_remote", ReuseMode.LINKED, KvSource.HOST)
LINKED_DISK = Way("linked_disk", ReuseMode.LINKED, KvSource.DISK)
WAYS = (FULL, PREFIX, LINKED_COLD, LINKED, LINKED_REMOTE, LINKED_DISK)

_REUSED_FROM = {
    KvSource.COMPILED: TokenSource.COMPILED,
    KvSource.DEVICE: TokenSource.DEVICE,
    KvSource.HOST: TokenSource.HOST,
    KvSource.DISK: TokenSource.DISK,
}


class WrongPath(RuntimeError):
    """A request did not do what its row says."""


def check(way: Way, result: Result, num_documents: int, document_tokens: int, kv_bytes_per_token: int) -> None:
    """Raises `WrongPath` unless sources and bytes of the answer's report are those of `way`."""
    reuse, total = result.reuse, result.num_prompt_tokens
    chunk_bytes = sum(transfer.chunk_bytes for transfer in reuse.transfers)
    stored_bytes = num_documents * document_tokens * kv_bytes_per_token
    is_moved = way.kv_source in (KvSource.HOST, KvSource.DISK, KvSource.COMPILED)
    if reuse.mode is not way.mode:
        raise WrongPath(f"{way.name} was answered {reuse.mode.name}")
    if (chunk_bytes < stored_bytes) if is_moved else chunk_bytes:
        raise WrongPath(f"{way.name} moved {chunk_bytes} bytes of chunks; the documents have {stored_bytes}")
    sources = {source: count for source, count in reuse.sources.items() if count}
    if not _is_of(way, sources, total, num_documents, document_tokens, reuse.link_tokens_per_chunk):
        raise WrongPath(f"{way.name} took its KV elsewhere: {sources} of {total} prompt tokens")


def _is_of(
    way: Way, sources: dict[TokenSource, int], total: int, num_documents: int, document_tokens: int, num_link: int
) -> bool:
    if way is FULL:
        return sources == {TokenSource.COMPUTED: total}
    if way is PREFIX:
        return sources.get(TokenSource.DEVICE, 0) >= total - 256 and set(sources) <= {
            TokenSource.DEVICE,
            TokenSource.COMPUTED,
        }
    reused_from = _REUSED_FROM[way.kv_source]
    expected = num_documents * (document_tokens - num_link)
    return sources.get(reused_from, 0) >= expected and set(sources) <= {
        reused_from,
        TokenSource.LINK,
        TokenSource.COMPUTED,
    }
