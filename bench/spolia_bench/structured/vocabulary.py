"""A byte-level tokenizer of any size, made of what words, numbers and code are made of."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_SYLLABLE = tuple(
    part.split(" ")
    for part in (
        " b br c ch d f g gr h k l m n p pl r s st t th v",
        "a e i o u ea ou ie",
        " n r s t l nd ng st ck",
    )
)
_PUNCTUATION = "()[]{}<>\"':;,.!?=+-*/\\_#"


def write_tokenizer(folder: Path, num_tokens: int, seed: int) -> None:
    """Writes a `tokenizer.json` of `num_tokens` ordinary tokens and one that ends a sequence, id `num_tokens`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    source = random.Random(seed)
    while len(vocab) < num_tokens:
        vocab.setdefault(_token(source), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def _token(source: random.Random) -> str:
    """A word or a piece of one, most of them behind a space; now and then punctuation or a number."""
    kind = source.random()
    if kind < 0.06:
        return "".join(source.choices(_PUNCTUATION, k=source.randint(2, 5)))
    if kind < 0.09:
        return "".join(source.choices("0123456789", k=source.randint(2, 4)))
    word = "".join(source.choice(part) for part in _SYLLABLE * source.randint(1, 3))
    word = word.capitalize() if kind < 0.3 else word
    return f"Ġ{word}" if kind < 0.75 else word
