"""What is supported is a list, not a hope: every model is checked layer by layer before it is loaded.

Position-independent reuse needs full attention, a standard softmax and a RoPE whose frequencies do not depend on the
context's length (`docs/architecture.md`, "What a model must be"). A model that breaks one of these in a way that would
change its answers is refused with `NotSupported`, naming the layer and the property.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spolia_core.errors import NotSupported

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LENGTH_FREE_ROPE = ("default", "linear", "llama3", "yarn")
LENGTH_BOUND_ROPE = ("dynamic", "longrope")
SOFTCAP_FIELDS = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True, slots=True)
class Support:
    """What a model may be used for. `linked_refusal` is empty where LINKED is supported, else the reason it is not."""

    max_context_tokens: int
    linked_refusal: str

    @property
    def linked(self) -> bool:
        """Whether its chunks may be reused at any position."""
        return not self.linked_refusal

    def require_linked(self) -> None:
        """Raises `NotSupported` with the reason where LINKED is not supported."""
        if self.linked_refusal:
            raise NotSupported(self.linked_refusal, field="mode", limit="EXACT", actual="LINKED")


def check_supported(config: Any, max_context_tokens: int | None = None) -> Support:
    """Checks a transformers config; `max_context_tokens` caps the context below what the model could do.

    Raises `NotSupported` naming the layer and property that stand in the way.
    """
    _refuse_softcap(config)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise unknown_architecture(config.model_type)
    if getattr(config, "quantization_config", None):
        raise _refusal("every layer", "quantization_config", "set", "weights in a floating-point dtype")
    limit = min(int(config.max_position_embeddings), max_context_tokens or int(config.max_position_embeddings))
    rope_type, original = _rope_of(config)
    linked_refusal = ""
    if rope_type in LENGTH_BOUND_ROPE:
        # Below the original length these frequencies are constant, so exact reuse holds there, and only there.
        limit = min(limit, original)
        linked_refusal = (
            f"every layer: rope_type is {rope_type!r}, whose frequencies depend on the context's length; "
            "LINKED needs one of " + ", ".join(LENGTH_FREE_ROPE)
        )
    elif rope_type not in LENGTH_FREE_ROPE:
        raise _refusal("every layer", "rope_type", rope_type, " or ".join(LENGTH_FREE_ROPE + LENGTH_BOUND_ROPE))
    _refuse_windows(config, limit)
    return Support(limit, linked_refusal)


def unknown_architecture(model_type: object) -> NotSupported:
    """The refusal of a model whose layers nobody here has checked."""
    return _refusal("every layer", "model_type", model_type, " or ".join(SUPPORTED_MODEL_TYPES))


def _refuse_softcap(config: Any) -> None:
    for name in SOFTCAP_FIELDS:
        if getattr(config, name, None):
            raise _refusal("layer 0", name, getattr(config, name), "no soft-capping of scores")


def _refuse_windows(config: Any, max_context_tokens: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is None or window >= max_context_tokens:  # Qwen's is None unless it is in use
        return
    # Mistral slides in every layer, whatever its config says of single ones.
    listed = None if config.model_type == "mistral" else getattr(config, "layer_types", None)
    kinds = listed or ["sliding_attention"] * config.num_hidden_layers
    for index, kind in enumerate(kinds):
        if kind != "full_attention":
            raise _refusal(f"layer {index}", "sliding_window", window, f"≥ the context of {max_context_tokens} tokens")


def _rope_of(config: Any) -> tuple[str, int]:
    """RoPE type, and the length up to which frequencies that depend on length are constant."""
    parameters = getattr(config, "rope_parameters", None) or {}
    partial = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    if partial not in (None, 1, 1.0):
        raise _refusal("every layer", "partial_rotary_factor", partial, "1")
    rope_type = str(parameters.get("rope_type", "default"))
    original = parameters.get("original_max_position_embeddings") if rope_type == "longrope" else None
    return rope_type, int(original or config.max_position_embeddings)


def _refusal(layer: str, name: str, actual: object, limit: str) -> NotSupported:
    return NotSupported(
        f"{layer}: {name} is {actual}; supported is {limit}", field=name, limit=limit, actual=str(actual)
    )
