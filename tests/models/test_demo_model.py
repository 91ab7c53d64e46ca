"""The committed demo checkpoint does what its card says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

_ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT))

from models.demo import evaluate, samples  # noqa: E402  (as below)
from models.demo.tokenizer import BOS, EOS  # noqa: E402  (as below)
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402  (the path must be set first)

from spolia_fidelity.tasks import make_corpus  # noqa: E402  (as below)

_FOLDER = _ROOT / "models" / "demo"
# Goals of the card, less what so small a sample may miss them by.
_GOALS = {"fact": 0.95, "cut": 0.85, "pronoun": 0.85, "two_hop": 0.75}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """The committed weights in float32."""
    torch.manual_seed(0)
    return evaluate.load(_FOLDER)[0]


@pytest.mark.slow
def test_questions_of_every_task_over_eight_parts_are_answered(model: LlamaForCausalLM) -> None:
    tokenizer = evaluate.load_tokenizer(_FOLDER)
    scores = evaluate.score_tasks(model, tokenizer, evaluate.make_corpora(7, 40, 8))
    for task, goal in _GOALS.items():
        assert scores[task].share >= goal, f"{task}: {scores[task]}"


def test_a_model_that_knows_nothing_scores_nothing(model: LlamaForCausalLM) -> None:
    tokenizer = evaluate.load_tokenizer(_FOLDER)
    blank = LlamaForCausalLM(model.config).eval()
    scores = evaluate.score_tasks(blank, tokenizer, evaluate.make_corpora(7, 2, 2))
    assert all(score.right == 0 for score in scores.values())


def test_demo_json_is_what_its_script_writes() -> None:
    written = json.loads((_FOLDER / "demo.json").read_text(encoding="utf-8"))
    assert any(samples.samples(seed) == written for seed in range(200))


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
    texts = list(make_corpus(3, 4).parts)
    parts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode("".join(texts), add_special_tokens=False).ids == [token for part in parts for token in part]
