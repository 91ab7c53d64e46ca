"""Reads plain prose and keeps a part of every text away from training."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HELD_OUT_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Prose:
    """Texts to train on, and the last part of each text, to measure on."""

    train: list[str]
    held_out: list[str]


def read_prose(paths: Sequence[Path]) -> list[str]:
    """Reads plain text, gzipped text, or gzipped JSON lines with a `text` field, as the file names say."""
    texts: list[str] = []
    for path in paths:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        if ".jsonl" in path.suffixes:
            texts += [str(json.loads(line)["text"]) for line in text.splitlines() if line.strip()]
        else:
            texts.append(text)
    return texts


def split_prose(texts: Sequence[str]) -> Prose:
    """Cuts the last 3 % off every text."""
    cuts = [int(len(text) * (1 - _HELD_OUT_SHARE)) for text in texts]
    return Prose(
        train=[text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        held_out=[text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )
