"""Weights read without transformers' classes are those that it reads, and what is not plain is left to it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worlds import LLAMA3, SIZES, letters, llama_config, model_of, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spolia_core.errors import DataCorrupt
from spolia_core.prompt import Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.engine import Engine
from spolia_engine.plain_checkpoint import read_plain

RELEASE = tuple(int(number) for number in version("transformers").split(".")[:2])
NAMES = [
    "llama",
    "llama-mha",
    "llama-mqa",
    "llama-tied",
    "llama-linear",
    "llama-llama3",
    "llama-yarn",
    "llama-dynamic",
    "llama-longrope",
    "qwen2",
    "qwen3",
    "mistral",
    "llama-bos",
]


def theirs(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, attn_implementation="eager")


def plain(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return read_plain(path, theirs(path).config, dtype)


def assert_same(one: Any, other: Any, dtype: str = "float32") -> None:
    """Config, frequencies and every weight by its name are in the fingerprint; how they are used is in the answer."""
    engines = [Engine(ModelAdapter(model, dtype=dtype), letters, num_blocks=64) for model in (one, other)]
    mine, its = (engine.adapter for engine in engines)
    assert mine.fingerprint == its.fingerprint
    assert (mine.kv_shape, mine.eos_token_ids, mine.bos_token_id) == (its.kv_shape, its.eos_token_ids, its.bos_token_id)
    assert mine._rope_scaling == its._rope_scaling
    answers = [engine.generate(Prompt.live(tokens(7)), SamplingParams(max_tokens=5)) for engine in engines]
    assert answers[0].token_ids == answers[1].token_ids
    hidden = torch.randn(3, mine.decoder.embedding.shape[1], dtype=mine.decoder.embedding.dtype)
    for layer, its_layer in zip(mine.decoder.layers, its.decoder.layers, strict=True):
        assert (layer.head_dim, layer.sm_scale) == (its_layer.head_dim, its_layer.sm_scale)
        turned, its_turned = (each.project(hidden, mine._rotation([0, 5, 9])) for each in (layer, its_layer))
        assert torch.equal(turned.query, its_turned.query)
        assert torch.equal(turned.value, its_turned.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_checkpoint_is_what_transformers_reads(tmp_path: Path, name: str) -> None:
    model_of(name).save_pretrained(tmp_path)
    found = plain(tmp_path)
    assert found is not None
    assert_same(found, theirs(tmp_path))


def test_biases_are_where_the_config_has_them(tmp_path: Path) -> None:
    LlamaForCausalLM(llama_config(attention_bias=True, mlp_bias=True, rope_parameters=dict(LLAMA3))).save_pretrained(
        tmp_path
    )
    found = plain(tmp_path)
    assert found is not None
    assert_same(found, theirs(tmp_path))


def test_weights_in_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    model_of("qwen3").save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = plain(tmp_path)
    assert found is not None
    assert_same(found, theirs(tmp_path))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("served", ["float32", "bfloat16"])
def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path: Path, stored: torch.dtype, served: str) -> None:
    model_of("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: weight.to(stored) for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    dtype = getattr(torch, served)
    assert_same(plain(tmp_path, dtype), theirs(tmp_path, dtype), served)


def test_tokens_that_end_an_answer_are_those_of_the_folder(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 11]}))
    assert ModelAdapter.load(tmp_path).eos_token_ids == ModelAdapter(theirs(tmp_path)).eos_token_ids == {7, 11}
    (tmp_path / "generation_config.json").write_text("{}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 3}))
    assert ModelAdapter.load(tmp_path).eos_token_ids == ModelAdapter(theirs(tmp_path)).eos_token_ids == {3}


def one_more(weights: dict[str, Any]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)


def one_less(weights: dict[str, Any]) -> None:
    del weights["model.norm.weight"]


def wider(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"] = torch.ones(int(SIZES["hidden_size"]) + 1)


def renamed(weights: dict[str, Any]) -> None:
    weights["transformer.norm.weight"] = weights.pop("model.norm.weight")


@pytest.mark.parametrize("change", [one_more, one_less, wider, renamed])
def test_what_is_not_as_expected_is_left_to_transformers(tmp_path: Path, change: Any) -> None:
    model_of("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    assert plain_of_config(tmp_path) is None
    if change is one_more:
        assert ModelAdapter.load(tmp_path).fingerprint == ModelAdapter(model_of("llama")).fingerprint
    else:
        with pytest.raises(DataCorrupt):
            ModelAdapter.load(tmp_path)


def plain_of_config(path: Path) -> Any:
    return read_plain(path, llama_config(), torch.float32)


def test_a_tied_head_that_is_stored_too_is_left_to_transformers(tmp_path: Path) -> None:
    model = model_of("llama-tied")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert read_plain(tmp_path, model.config, torch.float32) is None
    assert ModelAdapter.load(tmp_path).fingerprint == ModelAdapter(model).fingerprint


def test_other_activations_are_transformers_to_name(tmp_path: Path) -> None:
    LlamaForCausalLM(llama_config(hidden_act="gelu")).save_pretrained(tmp_path)
    assert plain(tmp_path) is None
    assert ModelAdapter.load(tmp_path).hidden_act == "gelu"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "tomorrow's"}))
    with pytest.raises(DataCorrupt, match=r"config\.json"):
        ModelAdapter.load(tmp_path)


def test_a_node_that_has_loaded_its_model_has_no_compiler_and_no_classes_of_models(tmp_path: Path) -> None:
    """They would take a second of every start and 160 MiB of every node; a config is checked all the same."""
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    code = f"""
import json, sys
from pathlib import Path
import spolia_decode.__main__, spolia_prefill.__main__
from spolia_core.errors import DataCorrupt
from spolia_core.prompt import Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
folder = Path({str(tmp_path)!r})
print(ModelAdapter.load(folder).fingerprint.hex())
names = ["torch._dynamo", "torch.distributed.tensor", "sympy", "triton", "transformers.modeling_utils"]
print([name for name in names if name in sys.modules])
config = json.loads((folder / "config.json").read_text())
(folder / "config.json").write_text(json.dumps({{**config, "hidden_act": "tomorrow's"}}))
try:
    ModelAdapter.load(folder)
except DataCorrupt as error:
    print(error.message)
"""
    expected = ModelAdapter(theirs(tmp_path)).fingerprint.hex()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    fingerprint, heavy, refusal = done.stdout.splitlines()
    assert fingerprint == expected
    if RELEASE >= (5, 23):  # 5.17 imports its models with any configuration, to write its documentation
        assert heavy == "[]"
    assert "there is no activation" in refusal
