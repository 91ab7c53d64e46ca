"""Documents to be warmed or forgotten: checked, and cut into local chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.ids import IdSpace
from spolia_core.prompt import check_token_ids
from spolia_core.splitting import Splitting
from spolia_gateway.limits import RequestLimits, check_may_fit, check_text
from spolia_gateway.served_models import Model
from spolia_gateway.split import EncodedText, split
from spolia_gateway.splitting import UNSPLIT, encode_document
from spolia_gateway.tokenizer import PartTokenizer


@dataclass(frozen=True, slots=True)
class DocumentChunk:
    """A document, or a piece of one, as a local chunk."""

    chunk_id: bytes
    token_ids: tuple[int, ...]


def check_documents(documents: Sequence[gateway_pb2.Document], limits: RequestLimits) -> None:
    """Raises `InvalidRequest` naming the first bad field. Cheap; nothing is tokenized yet."""
    if not documents:
        raise InvalidRequest("documents is empty", field="documents", limit="≥ 1", actual="0")
    limits.check_documents(len(documents))
    for index, document in enumerate(documents):
        check_text(document.text, f"documents[{index}].text")
    limits.check_bytes([len(document.text.encode()) for document in documents], "documents")


def chunks_of(
    documents: Sequence[gateway_pb2.Document],
    model: Model,
    ids: IdSpace,
    tokenizer: PartTokenizer,
    tenant_id: str,
    *,
    splitting: Splitting = UNSPLIT,
    limits: RequestLimits | None = None,
) -> tuple[tuple[DocumentChunk, ...], ...]:
    """The documents as the chunks that prompts would name, in order. Up to seconds: keep it off the event loop.

    Raises `InvalidRequest` for a document that no context of the model could hold, however it is cut, and for more
    chunks than `limits` allow.
    """

    def encode(field: str, document: gateway_pb2.Document) -> EncodedText:
        size = len(document.text.encode())
        check_may_fit(size, field, model.max_context_tokens, tokenizer.max_bytes_per_token)
        encoded = _encoded(field, document, model, tokenizer, tenant_id, splitting)
        _check_fits(encoded, field, document, model)
        return encoded

    return _cut(documents, ids, encode, splitting, limits or RequestLimits())


def stored_chunks_of(
    documents: Sequence[gateway_pb2.Document],
    model: Model,
    ids: IdSpace,
    tokenizer: PartTokenizer,
    tenant_id: str,
    *,
    splitting: Splitting = UNSPLIT,
    limits: RequestLimits | None = None,
) -> tuple[tuple[DocumentChunk, ...], ...]:
    """As `chunks_of`, whatever the context holds: when they were stored, the model may have been served with a longer
    one.
    """

    def encode(field: str, document: gateway_pb2.Document) -> EncodedText:
        return _encoded(field, document, model, tokenizer, tenant_id, splitting)

    return _cut(documents, ids, encode, splitting, limits or RequestLimits())


def _cut(
    documents: Sequence[gateway_pb2.Document],
    ids: IdSpace,
    encode: Callable[[str, gateway_pb2.Document], EncodedText],
    splitting: Splitting,
    limits: RequestLimits,
) -> tuple[tuple[DocumentChunk, ...], ...]:
    cut: list[list[tuple[int, ...]]] = []
    num_chunks = 0
    for index, document in enumerate(documents):
        cut.append(split(encode(f"documents[{index}].text", document), splitting))
        num_chunks += len(cut[-1])
        limits.check_chunks(num_chunks)
    return tuple(tuple(DocumentChunk(ids.local(token_ids), token_ids) for token_ids in pieces) for pieces in cut)


def _encoded(
    field: str,
    document: gateway_pb2.Document,
    model: Model,
    tokenizer: PartTokenizer,
    tenant_id: str,
    splitting: Splitting,
) -> EncodedText:
    encoded = encode_document(document.text, splitting, tokenizer, tenant_id)
    check_token_ids(encoded.token_ids, model.vocab_size, field=field)
    return encoded


def _check_fits(encoded: EncodedText, field: str, document: gateway_pb2.Document, model: Model) -> None:
    num_tokens = len(encoded.token_ids)
    if num_tokens + 1 > model.max_context_tokens:
        raise InvalidRequest(
            f"document {document.name!r} has {num_tokens} tokens; this model's context is "
            f"{model.max_context_tokens} tokens and must hold at least one more",
            field=field,
            limit=f"{model.max_context_tokens} tokens",
            actual=f"{num_tokens} tokens",
        )
