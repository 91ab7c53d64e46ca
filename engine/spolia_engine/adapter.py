"""The one place that knows transformers, with `model_configs` and `plain_checkpoint`: loads a model, takes its weights,
and runs passes over them.

Layers run one by one, each calling the `LayerAttention` of the pass, so a layer's KV can leave the node while the next
one runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spolia_core.chunk_object import KvShape
from spolia_core.errors import DataCorrupt, NotFound, NotSupported, SpoliaError
from spolia_engine.fingerprint import fingerprint_model
from spolia_engine.kv_bytes import hidden_from_bytes
from spolia_engine.model_configs import CONFIG_MAPPING, AutoConfig, known_activation
from spolia_engine.model_layers import Decoder, LayerAttention
from spolia_engine.plain_checkpoint import read_plain
from spolia_engine.steps import Pause, Steps, finish
from spolia_engine.support import check_supported, unknown_architecture
from spolia_kernels import RotaryTable, Rotation
from spolia_kernels.paged import Angles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class ModelAdapter:
    """A loaded causal language model of a supported kind. Immutable once built; used by one thread at a time."""

    def __init__(
        self,
        model: Any,
        *,
        dtype: str = "float32",
        max_context_tokens: int | None = None,
        takes_weights: bool = False,
    ) -> None:
        """Of a transformers `…ForCausalLM`, or what has the same weights (`plain_checkpoint`), whose weights are copied
        where this device wants another layout.

        `takes_weights`: the model is of no use afterwards, and never twice in memory. Raises `NotSupported` for models
        that cannot be served.
        """
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
        self.num_q_heads = int(config.num_attention_heads)
        self.hidden_act = str(config.hidden_act)
        model = model.to(DTYPES[dtype]).eval()
        # Made anew: the model's own frequencies follow `.to(dtype)` into 16 bits, or the length of what it ran before.
        rope = type(model.model.rotary_emb)(config)
        self._rope_scaling = float(rope.attention_scaling)
        self.device = next(model.parameters()).device
        self.fingerprint = fingerprint_model(model, rope.inv_freq, self._rope_scaling)
        self.decoder = Decoder.of(model, takes_weights=takes_weights)
        head_dim = self.decoder.layers[0].head_dim
        self.rotary = RotaryTable(
            rope.inv_freq, head_dim=head_dim, max_position=min(self.max_context_tokens, 4096), device=self.device
        )
        self.kv_shape = KvShape(
            self.num_layers, int(config.num_key_value_heads), head_dim, head_dim, SAFETENSORS_DTYPE[DTYPES[dtype]]
        )

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
        return cls(model.to(device), dtype=dtype, max_context_tokens=max_context_tokens, takes_weights=True)

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
        hidden, rotation = self._embed(token_ids), self._rotation(positions)
        for index, layer in enumerate(self.decoder.layers):
            while ready is not None and not ready(index):
                yield Pause(ready=partial(ready, index))
            hidden = layer(hidden, rotation, attention)
            if on_layer:
                on_layer(index)
        return self.decoder.norm(hidden)

    @torch.inference_mode()
    def values_at(
        self, layer: int, token_ids: Sequence[int], positions: Sequence[int], attention: LayerAttention
    ) -> Tensor:
        """V [num_kv_heads, num_rows, v_dim] of the rows at `layer`, as that layer would hand it to attention.

        Runs the layers before `layer` as `forward` does and stops there: nothing behind V's projection is computed.
        """
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"the model has {self.num_layers} layers, layer {layer} is not among them")
        hidden, rotation = self._embed(token_ids), self._rotation(positions)
        for before in self.decoder.layers[:layer]:
            hidden = before(hidden, rotation, attention)
        return self.decoder.layers[layer].project(hidden, rotation).value

    def hidden_from_bytes(self, data: bytes) -> Tensor:
        """A hidden state [hidden] that another node of this model kept. Raises `DataCorrupt` for another length."""
        embedding = self.decoder.embedding
        return hidden_from_bytes(data, embedding.shape[1], embedding.dtype).to(embedding.device)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [num_rows, vocab_size] in float32 of hidden states [num_rows, hidden]."""
        return self.decoder.head(hidden).float()

    def angles(self, num_positions: int) -> Angles:
        """What turns the model's own queries and keys, by position: the temperature of YaRN is in it.

        A query so turned by its distance from a span is turned back purely: the span's keys have theirs already.
        """
        cos, sin = self.rotary.cos_sin(torch.arange(num_positions, device=self.device))
        return Angles(cos * self._rope_scaling, sin * self._rope_scaling)

    def _embed(self, token_ids: Sequence[int]) -> Tensor:
        return self.decoder.embedding[torch.tensor(list(token_ids), device=self.device)]

    def _rotation(self, positions: Sequence[int]) -> Rotation:
        # From the same float64-exact table that rotates queries over spans, so both rotations agree to the last bit;
        # YaRN's temperature enters here, once, and never in the offset rotation.
        return Rotation.to(torch.tensor(list(positions), device=self.device), self.rotary, self._rope_scaling)


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
        activation = getattr(config, "hidden_act", None)
        if activation is not None and not known_activation(activation):
            raise ValueError(f"there is no activation {activation!r}")
        return config
    except NotSupported:
        raise
    except Exception as error:  # whatever a parser meets in a broken file
        raise DataCorrupt(f"{file} cannot be read: {error}", field="config.json", actual=str(file)) from error


def _read_weights(path: Path, config: Any, dtype: torch.dtype) -> Any:
    if not any(path.glob("*.safetensors")):
        raise NotFound(f"no *.safetensors in {path}", field="model", actual=str(path))
    try:
        plain = read_plain(path, config, dtype)
        return _read_as_transformers_does(path, config, dtype) if plain is None else plain
    except SpoliaError:
        raise
    except Exception as error:  # whatever a reader meets in a broken file
        raise DataCorrupt(f"the weights in {path} cannot be read: {error}", field="model", actual=str(path)) from error


def _read_as_transformers_does(path: Path, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM  # a second of processor time, which most models do without

    model, loading = AutoModelForCausalLM.from_pretrained(
        str(path),
        config=config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        attn_implementation="eager",
        output_loading_info=True,
    )
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
