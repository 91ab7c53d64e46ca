"""Models that cannot be served right are refused by layer and property, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worlds import DYNAMIC, LLAMA3, LONGROPE, PLAIN, SIZES, YARN, engine_of, llama_config, model_of
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Qwen2Config, Qwen3Config

from spolia_core.errors import DataCorrupt, NotFound, NotSupported
from spolia_core.prompt import Prompt
from spolia_core.reuse import ReuseMode
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.support import check_supported


def refusal(config: Any, max_context_tokens: int | None = None) -> NotSupported:
    with pytest.raises(NotSupported) as caught:
        check_supported(config, max_context_tokens)
    assert caught.value.field
    assert caught.value.limit
    assert caught.value.field in caught.value.message
    return caught.value


def mistral(window: int | None, **changes: Any) -> MistralConfig:
    return MistralConfig(**{**SIZES, "max_position_embeddings": 32768, "sliding_window": window, **changes})


def test_a_window_shorter_than_the_context_is_refused_by_layer_and_property() -> None:
    error = refusal(mistral(4096))
    assert "layer 0" in error.message
    assert error.field == "sliding_window"
    assert error.actual == "4096"
    assert "32768" in error.limit


@pytest.mark.parametrize("context", [1, 4095, 4096])
def test_a_window_at_least_as_long_as_the_context_is_accepted(context: int) -> None:
    assert check_supported(mistral(4096), context).max_context_tokens == context
    refusal(mistral(4096), 4097)


def test_mistral_without_a_window_is_accepted() -> None:
    assert check_supported(mistral(None)).max_context_tokens == 32768


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_the_first_layer_that_slides_is_named(config: Any) -> None:
    sizes = {**SIZES, "num_hidden_layers": 4, "sliding_window": 64}
    assert check_supported(config(**sizes)).linked  # not in use: no window
    error = refusal(config(**sizes, use_sliding_window=True, max_window_layers=2))
    assert "layer 2" in error.message
    assert check_supported(config(**sizes, use_sliding_window=True, max_window_layers=4)).linked


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_capping_is_refused_by_name(field: str) -> None:
    other = {"attn_logit_softcapping", "final_logit_softcapping"} - {field}
    error = refusal(Gemma2Config(**{field: 50.0}, **dict.fromkeys(other)))
    assert error.field == field
    assert "layer 0" in error.message
    assert error.actual == "50.0"


def test_quantised_weights_are_refused() -> None:
    assert refusal(llama_config(quantization_config={"quant_method": "gptq"})).field == "quantization_config"


def test_partial_rotary_is_refused() -> None:
    error = refusal(llama_config(rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}))
    assert error.field == "partial_rotary_factor"
    assert error.actual == "0.5"


def test_an_unknown_rope_is_refused() -> None:
    config = llama_config()
    config.rope_parameters = {**PLAIN, "rope_type": "proportional"}
    assert refusal(config).field == "rope_type"


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3, YARN])
def test_frequencies_without_length_serve_linked(rope: dict[str, Any]) -> None:
    support = check_supported(llama_config(rope_parameters=dict(rope)))
    assert support.linked
    support.require_linked()


@pytest.mark.parametrize(("rope", "limit"), [(LONGROPE, 256), (DYNAMIC, SIZES["max_position_embeddings"])])
def test_frequencies_bound_to_length_keep_exact_up_to_where_they_are_constant(rope: dict[str, Any], limit: int) -> None:
    support = check_supported(llama_config(rope_parameters=dict(rope)))
    assert not support.linked
    assert support.max_context_tokens == limit
    with pytest.raises(NotSupported, match=f"every layer: rope_type is '{rope['rope_type']}'") as caught:
        support.require_linked()
    assert (caught.value.limit, caught.value.actual) == ("EXACT", "LINKED")


@pytest.mark.parametrize("name", ["llama-longrope", "llama-dynamic"])
def test_linked_is_refused_and_exact_served_where_rope_depends_on_length(name: str) -> None:
    engine = engine_of(name)
    prompt = Prompt((*Prompt.live([1, 2]).parts, engine.chunk([3, 4, 5]), *Prompt.live([6]).parts))
    with pytest.raises(NotSupported, match="rope_type"):
        engine.generate(prompt, mode=ReuseMode.LINKED)
    assert len(engine.generate(prompt, SamplingParams(max_tokens=2)).token_ids) == 2


# Directories

SINKS = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 2}
UNKNOWN = {"model_type": "a_model_of_tomorrow", "architectures": ["TomorrowForCausalLM"]}
NAMELESS = {"architectures": ["LlamaForCausalLM"]}


def directory(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"no weights here")
    return path


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SINKS, "model_type"),
        (UNKNOWN, "model_type"),
        (NAMELESS, "model_type"),
        (Gemma2Config().to_dict(), "attn_logit_softcapping"),
        (mistral(4096).to_dict(), "sliding_window"),
        (llama_config(rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}).to_dict(), "partial_rotary_factor"),
    ],
)
def test_no_weight_is_read_before_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _must_not_be_called)
    with pytest.raises(NotSupported) as caught:
        ModelAdapter.load(directory(tmp_path, config))
    assert caught.value.field == field


def _must_not_be_called(*_: object, **__: object) -> None:
    raise AssertionError("weights were read before the config was checked")


def test_a_directory_without_a_model_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        ModelAdapter.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(llama_config().to_dict()))
    with pytest.raises(NotFound, match="safetensors"):
        ModelAdapter.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_config_that_cannot_be_read_is_corrupt(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataCorrupt, match=r"config\.json"):
        ModelAdapter.load(tmp_path)


def test_broken_weights_are_corrupt(tmp_path: Path) -> None:
    with pytest.raises(DataCorrupt, match="weights"):
        ModelAdapter.load(directory(tmp_path, llama_config().to_dict()))


def test_missing_weights_are_corrupt_and_named_never_made_up(tmp_path: Path) -> None:
    state = dict(model_of("llama").state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    model_of("llama").save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(DataCorrupt, match=r"layers\.1\.mlp\.up_proj"):
        ModelAdapter.load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_a_saved_model_loads_as_the_same_model(tmp_path: Path, name: str) -> None:
    model_of(name).save_pretrained(tmp_path)
    loaded = ModelAdapter.load(tmp_path)
    again = ModelAdapter.load(tmp_path)
    shorter = ModelAdapter.load(tmp_path, max_context_tokens=64)
    other = ModelAdapter.load(tmp_path, dtype="bfloat16")
    assert loaded.fingerprint == again.fingerprint == shorter.fingerprint
    assert loaded.fingerprint != other.fingerprint
    assert shorter.max_context_tokens == 64
    assert other.kv_shape.dtype == "BF16"


def test_every_weight_enters_the_fingerprint() -> None:
    model = type(model_of("llama"))(llama_config())
    seen = {ModelAdapter(model).fingerprint}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] += 1
            seen.add(ModelAdapter(model).fingerprint)
    assert len(seen) == 1 + len(list(model.parameters()))


def test_rope_enters_the_fingerprint() -> None:
    plain = type(model_of("llama"))(llama_config())
    scaled = type(model_of("llama"))(llama_config(rope_parameters={**PLAIN, "rope_theta": 20000.0}))
    scaled.load_state_dict(plain.state_dict())
    assert ModelAdapter(plain).fingerprint != ModelAdapter(scaled).fingerprint
