"""The committed demo checkpoint does what its card says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT))

from models.demo import data, evaluate  # noqa: E402
from models.demo.tokenizer import BOS, EOS  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402  (the path must be set first)

_FOLDER = _ROOT / "models" / "demo"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The committed weights in float32."""
    torch.manual_seed(0)
    return evaluate.load(_FOLDER)[0]


def test_nine_of_ten_single_facts_over_four_documents_are_answered(model: LlamaForCausalLM) -> None:
    tokenizer = evaluate.load_tokenizer(_FOLDER)
    trials = evaluate.make_trials(tokenizer, seed=7, num_documents=4, num_questions=200)
    result = evaluate.score(trials, evaluate.answer(model, tokenizer, trials))
    assert result.share >= 0.9, str(result)


def test_checkpoint_stays_small_and_reaches_8192_positions(model: LlamaForCausalLM) -> None:
    assert sum(p.numel() for p in model.parameters()) <= 7_500_000
    assert model.config.max_position_embeddings == 8192
    assert sum(file.stat().st_size for file in _FOLDER.iterdir() if file.is_file()) <= 16 * 2**20


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "The keeper of Lemdale.\n",
        "  two  spaces ",
        "tab\tand\r\nreturn",
        "naïve – “quoted” ☃ 漢字 🙂",
        "\x00\x7f",
    ],
)
def test_tokenizer_returns_every_text_unchanged(text: str) -> None:
    plain = evaluate.load_tokenizer(_FOLDER)
    loaded = AutoTokenizer.from_pretrained(_FOLDER)
    ids = plain.encode(text, add_special_tokens=False).ids
    assert plain.decode(ids, skip_special_tokens=False) == text
    assert loaded.encode(text, add_special_tokens=False) == ids
    assert loaded.decode(ids) == text


def test_special_tokens_are_added_on_request_only() -> None:
    loaded = AutoTokenizer.from_pretrained(_FOLDER)
    assert (loaded.bos_token, loaded.eos_token) == (BOS, EOS)
    assert loaded.encode("A village.") == [
        loaded.bos_token_id,
        *loaded.encode("A village.", add_special_tokens=False),
    ]


def test_parts_encode_as_their_concatenation_does() -> None:
    tokenizer = evaluate.load_tokenizer(_FOLDER)
    texts = [document.text for document in data.make_corpus(3, 4)]
    parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode("".join(texts), add_special_tokens=False).ids == [token for part in parts for token in part]


def test_a_seed_names_one_corpus_of_held_out_names() -> None:
    documents = data.make_corpus(5, 6)
    assert documents == data.make_corpus(5, 6)
    assert len({document.entity for document in documents}) == 6
    people = [fact.value for document in documents for fact in document.facts if fact.template.value == "person"]
    assert people
    assert all(data.is_held_out(name) for name in people)
    for question in data.make_questions(5, documents):
        assert question.answer in documents[question.document].text
