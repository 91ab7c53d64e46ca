"""The one place that knows transformers: loads a model and runs its own modules with our attention.

transformers lets an attention function be registered by name (`AttentionInterface`). Ours receives queries, keys and
values after projection, norm and RoPE, and hands them to the `LayerAttention` of the running pass. Layers are called
one by one, so a layer's KV can leave the node while the next one runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig, AutoModelForCausalLM

from spolia_core.chunk_object import KvShape
from spolia_core.errors import DataCorrupt, NotFound, NotSupported
from spolia_engine.fingerprint import fingerprint_model
from spolia_engine.steps import Pause, Steps, finish
from spolia_engine.support import check_supported, unknown_architecture
from spolia_kernels import RotaryTable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ATTENTION_NAME = "spolia"


class LayerAttention(Protocol):
    """Attention of one layer of a pass, and where its KV goes.

    `query` [num_q_heads, num_rows, head_dim], `key` [num_kv_heads, num_rows, head_dim] (both rotated to the rows'
    positions) and `value` [num_kv_heads, num_rows, v_dim] of the rows; returns [num_q_heads, num_rows, v_dim].
    """

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Writes the rows' KV and attends."""
        ...


class _Stopped(Exception):
    """Ends a pass whose purpose is reached."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


class _StopAt:
    """Attends as `attention` does, up to a layer, and ends the pass with that layer's V."""

    def __init__(self, layer: int, attention: LayerAttention) -> None:
        self._layer = layer
        self._attention = attention

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
        """Raises `_Stopped` at the layer."""
        if layer == self._layer:
            raise _Stopped(value)
        return self._attention(layer, query, key, value, sm_scale)


def _attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    attend: LayerAttention = kwargs["spolia_attention"]
    layer: int = module.layer_idx  # type: ignore[assignment]  # nn.Module types every attribute as Tensor | Module
    out = attend(layer, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _attention_function)


class ModelAdapter:
    """A loaded causal language model of a supported kind. Immutable once built; used by one thread at a time."""

    def __init__(self, model: Any, *, dtype: str = "float32", max_context_tokens: int | None = None) -> None:
        """Wraps a transformers `…ForCausalLM`. Raises `NotSupported` for models that cannot be served."""
        config = model.config
        self.support = check_supported(config, max_context_tokens)
        self.compute_dtype = dtype
        self.max_context_tokens = self.support.max_context_tokens
        self.vocab_size = int(config.vocab_size)
        self.eos_token_ids = _eos_ids(model)
        # From the config alone, which the fingerprint covers: what this token decides is in chunks' KV.
        # `_read_config` sees to it that the config has no token that its file does not name.
        bos = getattr(config, "bos_token_id", None)
        self.bos_token_id: int | None = bos if bos is not None and 0 <= bos < self.vocab_size else None
        self.num_layers = int(config.num_hidden_layers)
        self._model = model.to(DTYPES[dtype]).eval()
        self._model.config._attn_implementation = ATTENTION_NAME
        # Made anew: the model's own frequencies follow `.to(dtype)` into 16 bits, or the length of what it ran before.
        rope = type(self._model.model.rotary_emb)(config)
        self._rope_scaling = float(rope.attention_scaling)
        head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.device = next(model.parameters()).device
        self.rotary = RotaryTable(
            rope.inv_freq, head_dim=head_dim, max_position=min(self.max_context_tokens, 4096), device=self.device
        )
        self.kv_shape = KvShape(
            self.num_layers, int(config.num_key_value_heads), head_dim, head_dim, SAFETENSORS_DTYPE[DTYPES[dtype]]
        )
        self.fingerprint = fingerprint_model(self._model, rope.inv_freq, self._rope_scaling)

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: str = "float32", max_context_tokens: int | None = None, device: str = "cpu"
    ) -> ModelAdapter:
        """Loads a Hugging Face-format directory. Checks the config before reading weights.

        Raises `NotFound` when there is no model at `path`, `NotSupported` when it cannot be served, `DataCorrupt` when
        its files cannot be read or lack weights.
        """
        config = _read_config(Path(path))
        check_supported(config, max_context_tokens)
        model = _read_weights(Path(path), config, DTYPES[dtype])
        return cls(model.to(device), dtype=dtype, max_context_tokens=max_context_tokens)

    def forward(self, token_ids: Sequence[int], positions: Sequence[int], attention: LayerAttention) -> Tensor:
        """Runs the layers over rows of tokens standing at `positions` and returns hidden states [num_rows, hidden].

        Rows may belong to different sequences: what a row sees is `attention`'s business.
        """
        return finish(self.forward_steps(token_ids, positions, attention))

    @torch.inference_mode()
    def forward_steps(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        attention: LayerAttention,
        on_layer: Callable[[int], None] | None = None,
        ready: Callable[[int], bool] | None = None,
    ) -> Steps[Tensor]:
        """`forward`, which waits before layer l until `ready(l)`, and calls `on_layer(l)` when it has run, its KV
        written. It pauses only where it has to wait.
        """
        inner = self._model.model
        hidden = inner.embed_tokens(torch.tensor([list(token_ids)], device=self.device))
        cos, sin = self._position_embeddings(torch.tensor(list(positions), device=self.device), hidden.dtype)
        for index, layer in enumerate(inner.layers):
            while ready is not None and not ready(index):
                yield Pause(ready=partial(ready, index))
            hidden = layer(hidden, position_embeddings=(cos, sin), attention_mask=None, spolia_attention=attention)
            if on_layer:
                on_layer(index)
        normed: Tensor = inner.norm(hidden)
        return normed[0]

    def values_at(
        self, layer: int, token_ids: Sequence[int], positions: Sequence[int], attention: LayerAttention
    ) -> Tensor:
        """V [num_kv_heads, num_rows, v_dim] of the rows at `layer`, as that layer would hand it to attention.

        Runs the layers before `layer` as `forward` does and stops there: nothing behind V's projection is computed.
        """
        try:
            self.forward(token_ids, positions, _StopAt(layer, attention))
        except _Stopped as stopped:
            return stopped.value
        raise IndexError(f"the model has {self.num_layers} layers, layer {layer} is not among them")

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [num_rows, vocab_size] in float32 of hidden states [num_rows, hidden]."""
        logits: Tensor = self._model.lm_head(hidden)
        return logits.float()

    def _position_embeddings(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # From the same float64-exact table that rotates queries over spans, so both rotations agree to the last bit;
        # YaRN's temperature enters here, once, and never in the offset rotation.
        cos, sin = (
            (torch.cat((half, half), -1) * self._rope_scaling).to(dtype).unsqueeze(0)
            for half in self.rotary.cos_sin(positions)
        )
        return cos, sin


def _read_config(path: Path) -> Any:
    file = path / "config.json"
    if not file.is_file():
        raise NotFound(f"no config.json in {path}", field="model", actual=str(path))
    try:
        said = json.loads(file.read_bytes())
        model_type = said.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise unknown_architecture(model_type)
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        # A token that the file does not name would be the class's default, which in this vocabulary may be any other.
        bos = said.get("bos_token_id")
        config.bos_token_id = bos if type(bos) is int else None
        return config
    except NotSupported:
        raise
    except Exception as error:  # whatever a parser meets in a broken file
        raise DataCorrupt(f"{file} cannot be read: {error}", field="config.json", actual=str(file)) from error


def _read_weights(path: Path, config: Any, dtype: torch.dtype) -> Any:
    if not any(path.glob("*.safetensors")):
        raise NotFound(f"no *.safetensors in {path}", field="model", actual=str(path))
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
    except Exception as error:  # whatever a reader meets in a broken file
        raise DataCorrupt(f"the weights in {path} cannot be read: {error}", field="model", actual=str(path)) from error
    # transformers would run with random numbers in the place of missing weights.
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise DataCorrupt(f"{path} lacks the weights {missing}", field="model", actual=str(path))
    return model


def _eos_ids(model: Any) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    found = model.config.eos_token_id if found is None else found
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [found])
