"""Documents to be warmed or forgotten: checked, and turned into local chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.ids import IdSpace
from spolia_core.prompt import check_token_ids
from spolia_gateway.catalog import Model
from spolia_gateway.limits import RequestLimits, check_may_fit, check_text
from spolia_gateway.tokenizer import Form, PartTokenizer


@dataclass(frozen=True, slots=True)
class DocumentChunk:
    """A document as a local chunk."""

    chunk_id: bytes
    token_ids: tuple[int, ...]


def check_documents(documents: Sequence[gateway_pb2.Document], limits: RequestLimits) -> None:
    """Raises `InvalidRequest` naming the first bad field. Cheap; nothing is tokenized yet."""
    limits.check_count(len(documents), limits.max_documents, "documents")
    for index, document in enumerate(documents):
        check_text(document.text, f"documents[{index}].text")
    limits.check_bytes([len(document.text.encode()) for document in documents], "documents")


def chunks_of(
    documents: Sequence[gateway_pb2.Document], model: Model, ids: IdSpace, tokenizer: PartTokenizer, tenant_id: str
) -> tuple[DocumentChunk, ...]:
    """The documents as the chunks that prompts would name, in order. Up to seconds: keep it off the event loop.

    Raises `InvalidRequest` for a document that no context of the model could hold.
    """
    return tuple(
        _chunk(f"documents[{index}].text", document, model, ids, tokenizer, tenant_id)
        for index, document in enumerate(documents)
    )


def _chunk(
    field: str,
    document: gateway_pb2.Document,
    model: Model,
    ids: IdSpace,
    tokenizer: PartTokenizer,
    tenant_id: str,
) -> DocumentChunk:
    size = len(document.text.encode())
    check_may_fit(size, field, model.max_context_tokens, tokenizer.max_bytes_per_token)
    token_ids = tokenizer.encode(document.text, Form.DOCUMENT, tenant_id=tenant_id)
    check_token_ids(token_ids, model.vocab_size, field=field)
    if len(token_ids) + 1 > model.max_context_tokens:
        raise InvalidRequest(
            f"document {document.name!r} has {len(token_ids)} tokens; this model's context is "
            f"{model.max_context_tokens} tokens and must hold at least one more",
            field=field,
            limit=f"{model.max_context_tokens} tokens",
            actual=f"{len(token_ids)} tokens",
        )
    return DocumentChunk(ids.local(token_ids), token_ids)
