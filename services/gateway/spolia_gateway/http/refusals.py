"""What OpenAI's API has and this server does not: refused by name, before anything is held."""

from __future__ import annotations

from typing import Any

from spolia_core.errors import NotSupported
from spolia_gateway.http.chat_request import ChatRequest
from spolia_gateway.http.completion_request import CompletionRequest
from spolia_gateway.http.fields import GenerationFields


def check_chat(body: ChatRequest) -> None:
    """Raises `NotSupported` for the first field that asks for what is not served."""
    _check_common(body)


def check_completion(body: CompletionRequest) -> None:
    """Raises `NotSupported` for the first field that asks for what is not served."""
    _check_common(body)
    if body.echo:
        raise _not_served("echo", "true", "false")
    if body.suffix:
        raise _not_served("suffix", "a text", "none")
    if body.best_of is not None and body.best_of != body.num_samples:
        raise _not_served("best_of", str(body.best_of), f"n, which is {body.num_samples}")


def _check_common(body: GenerationFields) -> None:
    if body.frequency_penalty:
        raise _not_served("frequency_penalty", str(body.frequency_penalty), "0")
    if body.presence_penalty:
        raise _not_served("presence_penalty", str(body.presence_penalty), "0")
    if body.logit_bias:
        raise _not_served("logit_bias", f"{len(body.logit_bias)} tokens", "none")


def _not_served(field: str, actual: Any, limit: str) -> NotSupported:
    return NotSupported(f"{field} is served as {limit} only, got {actual}", field=field, limit=limit, actual=actual)
