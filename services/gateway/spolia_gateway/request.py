"""From what a client sends to what a decode node takes: validation, tokenization, ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spolia.v1 import gateway_pb2
from spolia_core.errors import InvalidRequest
from spolia_core.ids import IdSpace
from spolia_core.prompt import Part, Prompt, check_context_length, check_token_ids
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_core.splitting import Splitting
from spolia_gateway.generation_request import GenerationRequest
from spolia_gateway.limits import (
    TOKEN_ID_BYTES,
    RequestLimits,
    check_cache_salt,
    check_may_fit,
    check_text,
    request_id_of,
)
from spolia_gateway.sampling import fit_max_tokens, read_sampling
from spolia_gateway.served_models import Model
from spolia_gateway.split import split
from spolia_gateway.splitting import UNSPLIT, encode_document, read_splitting
from spolia_gateway.tokenizer import Form, PartTokenizer, cache_scope
from spolia_node.rpc_messages import mode_from_pb


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request whose fields are sound as far as can be told without its tokens."""

    message: gateway_pb2.GenerateRequest
    request_id: str
    mode: ReuseMode
    sampling: SamplingParams
    splitting: Splitting
    limits: RequestLimits

    @classmethod
    def check(
        cls, message: gateway_pb2.GenerateRequest, limits: RequestLimits, default_splitting: Splitting = UNSPLIT
    ) -> CheckedRequest:
        """Raises `InvalidRequest` naming the first bad field. Cheap; nothing is held yet."""
        request_id = request_id_of(message.request_id)
        check_cache_salt(message.cache_salt)
        limits.check_count(len(message.parts), limits.max_parts, "parts")
        sizes = [_check_part(part, f"parts[{index}]") for index, part in enumerate(message.parts)]
        limits.check_bytes(sizes, "parts")
        num_documents = sum(part.WhichOneof("part") == "document" for part in message.parts)
        if num_documents:
            limits.check_count(num_documents, limits.max_documents, "parts.document")
        mode = mode_from_pb(message.mode, unspecified=ReuseMode.EXACT)
        splitting = read_splitting(message.splitting, default_splitting)
        return cls(message, request_id, mode, read_sampling(message.sampling), splitting, limits)

    @property
    def num_text_bytes(self) -> int:
        """Bytes of text to tokenize."""
        return sum(_text_bytes(part) for part in self.message.parts)

    @property
    def num_content_bytes(self) -> int:
        """The same, and the bytes of parts that are given as ids."""
        return self.num_text_bytes + sum(len(part.token_ids.ids) for part in self.message.parts) * TOKEN_ID_BYTES

    def build(self, model: Model, ids: IdSpace, tokenizer: PartTokenizer, tenant_id: str) -> GenerationRequest:
        """Tokenizes and derives ids; seconds for the longest prompts, so keep it off the event loop.

        Raises `InvalidRequest` for token ids out of range, a context too long or too many chunks, `NotSupported` where
        the model cannot serve the mode, or its profile forbids it and the request does not force it.
        """
        if self.mode is ReuseMode.LINKED:
            model.check_linked(force_linked=self.message.force_linked)
        check_may_fit(self.num_text_bytes, "parts", model.max_context_tokens, tokenizer.max_bytes_per_token)
        scope = cache_scope(tenant_id, self.message.cache_salt)
        prompt = Prompt(tuple(self._parts(model, ids, tokenizer, scope)))
        check_context_length(prompt.num_tokens, model.max_context_tokens)
        sampling = fit_max_tokens(
            self.sampling,
            stated=self.message.sampling.HasField("max_tokens"),
            num_prompt_tokens=prompt.num_tokens,
            max_context_tokens=model.max_context_tokens,
        )
        return GenerationRequest(
            request_id=self.request_id,
            tenant_id=tenant_id,
            model=model.key,
            prompt=prompt,
            mode=self.mode,
            force_linked=self.message.force_linked,
            sampling=sampling,
            cache_salt=self.message.cache_salt,
        )

    def token_ids(self, tokenizer: PartTokenizer, tenant_id: str) -> list[int]:
        """The prompt's ids alone; as slow as `build`. Ids given in the request are not checked against a model."""
        scope = cache_scope(tenant_id, self.message.cache_salt)
        ids: list[int] = []
        for index, part in enumerate(self.message.parts):
            ids += _encode(part, tokenizer, scope, starts_prompt=index == 0)
        lacks_bos = not self.message.no_bos and _lacks_bos(ids, tokenizer.bos_ids)
        return [*tokenizer.bos_ids, *ids] if lacks_bos else ids

    def _parts(self, model: Model, ids: IdSpace, tokenizer: PartTokenizer, scope: str) -> list[Part]:
        parts: list[Part] = []
        num_chunks = 0
        for index, part in enumerate(self.message.parts):
            kind, field = part.WhichOneof("part"), f"parts[{index}].{part.WhichOneof('part')}"
            if self.mode is ReuseMode.LINKED and kind == "document":
                encoded = encode_document(part.document.text, self.splitting, tokenizer, scope)
                check_token_ids(encoded.token_ids, model.vocab_size, field=field)
                pieces = split(encoded, self.splitting)
                num_chunks += len(pieces)
                self.limits.check_chunks(num_chunks)
                parts.extend(Part(token_ids, ids.local(token_ids)) for token_ids in pieces)
            else:
                token_ids = _encode(part, tokenizer, scope, starts_prompt=index == 0)
                check_token_ids(token_ids, model.vocab_size, field=field)
                parts.append(Part(token_ids))
        if not self.message.no_bos and _lacks_bos(parts[0].token_ids, tokenizer.bos_ids):
            parts.insert(0, Part(tokenizer.bos_ids))
        return parts


def _check_part(part: gateway_pb2.PromptPart, field: str) -> int:
    """Bytes of a part's content. Raises `InvalidRequest` when it has none."""
    match part.WhichOneof("part"):
        case "text":
            return check_text(part.text, f"{field}.text")
        case "document":
            return check_text(part.document.text, f"{field}.document.text")
        case "token_ids":
            if not part.token_ids.ids:
                raise InvalidRequest(
                    f"{field}.token_ids is empty", field=f"{field}.token_ids", limit="≥ 1 token", actual="0"
                )
            return len(part.token_ids.ids) * TOKEN_ID_BYTES
        case _:
            raise InvalidRequest(
                f"{field} is empty", field=field, limit="one of text, document, token_ids", actual="none"
            )


def _text_bytes(part: gateway_pb2.PromptPart) -> int:
    """Bytes of the text in a part; none in one that is given as ids. Only one of the two is set."""
    return len(part.text.encode()) + len(part.document.text.encode())


def _encode(
    part: gateway_pb2.PromptPart, tokenizer: PartTokenizer, tenant_id: str, *, starts_prompt: bool
) -> tuple[int, ...]:
    if part.WhichOneof("part") == "token_ids":
        return tuple(part.token_ids.ids)
    if part.WhichOneof("part") == "document":
        return tokenizer.encode(part.document.text, Form.DOCUMENT, tenant_id=tenant_id)
    return tokenizer.encode(part.text, Form.HEAD if starts_prompt else Form.BODY, tenant_id=tenant_id)


def _lacks_bos(first: Sequence[int], bos_ids: Sequence[int]) -> bool:
    """A caller who tokenizes, or spells out a chat template, may have begun with it: it is never doubled."""
    return tuple(first[: len(bos_ids)]) != tuple(bos_ids)
