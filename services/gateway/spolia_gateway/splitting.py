"""How a request's documents are cut: read from its message, and applied to a text."""

from __future__ import annotations

from array import array

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.splitting import Splitter, Splitting
from spolia_gateway.split import EncodedText
from spolia_gateway.tokenizer import Form, PartTokenizer

UNSPLIT = Splitting(Splitter.DOCUMENT)
_NEED_STARTS = (Splitter.PARAGRAPH, Splitter.SENTENCE)


def read_splitting(message: gateway_pb2.Splitting, default: Splitting) -> Splitting:
    """What the message asks for, `default` where it leaves something open. Raises `InvalidRequest` for a bad value."""
    return Splitting(_splitter(message.splitter, default.splitter), message.max_tokens or default.max_tokens)


def _splitter(number: int, default: Splitter) -> Splitter:
    if number == gateway_pb2.SPLITTER_UNSPECIFIED:
        return default
    try:
        return Splitter(number)
    except ValueError:
        names = ", ".join(known.name for known in Splitter)
        raise InvalidRequest(
            f"splitting.splitter must be {names}, got {number}",
            field="splitting.splitter",
            limit=names,
            actual=str(number),
        ) from None


def encode_document(text: str, splitting: Splitting, tokenizer: PartTokenizer, tenant_id: str) -> EncodedText:
    """A document's ids, and what splitting it needs besides. The ids are the same however it will be cut."""
    if splitting.splitter in _NEED_STARTS:
        return tokenizer.encode_with_starts(text, tenant_id=tenant_id)
    return EncodedText(text, tokenizer.encode(text, Form.DOCUMENT, tenant_id=tenant_id), array("I"))
