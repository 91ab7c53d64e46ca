"""A model for timing with a real one's tokenizer and chat template: requests are written as users write them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from spolia_bench.models import CACHE, Shape, random_weights
from spolia_core.tokenizer_files import TokenizerFiles

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def chat_model(shape: Shape, tokenizer: Path, seed: int, cache: Path = CACHE) -> Path:
    """A model directory with random float32 weights; made once, then found again."""
    path = cache / f"{shape.name}-{tokenizer.resolve().name}-{seed}"
    if not (path / TOKENIZER_FILES[-1]).is_file():
        known = Tokenizer.from_file(str(tokenizer / TOKENIZER_FILES[0]))
        building = path.with_suffix(".building")
        shutil.rmtree(building, ignore_errors=True)
        files = TokenizerFiles.read(tokenizer)
        (bos,), (eos,) = files.bos_ids(known), files.eos_ids(known)
        weights = random_weights(shape, seed, vocab_size=known.get_vocab_size(), bos_id=bos, eos_id=eos)
        weights.save_pretrained(building)
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, building / name)
        shutil.rmtree(path, ignore_errors=True)
        building.rename(path)
    return path
