"""Tiny tokenizers of the two great kinds, and model directories that hold one."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from spolia_core.tokenizer_files import TokenizerFiles
from spolia_gateway.tokenizer import PartTokenizer

LINES = ["the stones of one building", "are cut and set again in another", "<s>[user] what was it? [end]", "é€ 漢字"]


def byte_level_tokenizer(*, add_prefix_space: bool = False, bos: bool = True) -> Tokenizer:
    """A byte-level BPE with <s>, </s> and [user] as special tokens, like most models of today."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "[user]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer


def sentencepiece_tokenizer(style: str) -> Tokenizer:
    """A SentencePiece-like BPE that puts "▁" before what it encodes: `style` is metaspace, first, or prepend."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if style == "first" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=scheme)])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(LINES[:2], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def parts_tokenizer(tokenizer: Tokenizer) -> PartTokenizer:
    """A gateway's tokenizer made of one, without a configuration beside it."""
    return PartTokenizer(TokenizerFiles(json.loads(tokenizer.to_str()), {}))


def write_model(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """A model directory without weights: what a gateway reads of one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
