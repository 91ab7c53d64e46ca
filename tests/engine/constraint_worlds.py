"""Random models that speak the demo model's tokens, and schemas with what must hold of their values."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from engine_worlds import llama_config
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from spolia_core.constraint import Constraint
from spolia_core.prompt import Part, Prompt
from spolia_core.sampling import SamplingParams
from spolia_engine.adapter import ModelAdapter
from spolia_engine.engine import Engine
from spolia_engine.generation import Generation
from spolia_engine.grammar import Grammar, Grammars, Matcher
from spolia_engine.next_tokens import draw
from spolia_engine.text import load_decode

DEMO = Path(__file__).parents[2] / "models" / "demo"
VOCAB_SIZE = 3072
EOS = 1

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 3},
        "address": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/address"}]},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "home": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}


def check_person(value: Any) -> None:
    """Fails unless `PERSON` accepts the value."""
    assert list(value) == ["name", "age", "tags", "address"]
    assert 1 <= len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"red", "blue"}
    address = value["address"]
    if address is not None:
        assert set(address) - {"home"} == {"zip"}
        assert len(address["zip"]) == 5
        assert address["zip"].isdigit()
        assert isinstance(address.get("home", True), bool)


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@cache
def random_engine() -> Engine:
    """Weights that mean nothing, over the demo model's tokens."""
    torch.manual_seed(5)
    config = llama_config(vocab_size=VOCAB_SIZE, eos_token_id=EOS, initializer_range=0.3)
    adapter = ModelAdapter(LlamaForCausalLM(config).eval())
    return Engine.of(adapter, load_decode(DEMO), pool_bytes=1 << 24, grammars=demo_grammars())


def demo_grammars() -> Grammars:
    return Grammars.of(DEMO, VOCAB_SIZE, frozenset([EOS]))


def prompt_of(text: str) -> Prompt:
    return Prompt((Part(tuple(demo_tokenizer().encode(text).ids)),))


def answers(constraint: Constraint | None, num_samples: int = 1, **params: Any) -> list[Any]:
    """What the random model says."""
    sampling = SamplingParams(**{"temperature": 1.0, "seed": 1, "max_tokens": 400, **params, "constraint": constraint})
    return random_engine().generate_samples(prompt_of("Who are you?"), num_samples, sampling)


def drawn_alone(generation: Generation, seed: int) -> Generation:
    """An answer drawn from random logits, without a model."""
    generator = torch.Generator().manual_seed(seed)
    while generation.finish_reason is None:
        draw(generation, torch.randn(VOCAB_SIZE, generator=generator) * 3)
    return generation


def follow(grammar: Grammar, text: str) -> Matcher:
    """A matcher behind `text`, every token of which must be allowed."""
    matcher = grammar.matcher()
    for token_id in demo_tokenizer().encode(text, add_special_tokens=False).ids:
        assert token_id in matcher.allowed(), f"{demo_tokenizer().decode([token_id])!r} of {text!r}"
        assert matcher.take(token_id)
    return matcher


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether `text` may be a whole answer."""
    matcher = grammar.matcher()
    for token_id in demo_tokenizer().encode(text, add_special_tokens=False).ids:
        if not matcher.take(token_id):
            return False
    return matcher.is_match


def is_json_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)
