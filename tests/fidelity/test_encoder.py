"""Parts are encoded alone, as a prompt's parts are: no dummy prefix, no special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from input_worlds import word_encoder
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from spolia_core.errors import NotFound
from spolia_core.tokenizer_files import TokenizerFiles
from spolia_fidelity.encoder import TextEncoder

VOCAB = {"<s>": 0, "</s>": 1, "a": 2, "▁": 3, "▁a": 4, "Ġ": 5, "Ġa": 6}


def encoder(tokenizer: Tokenizer, **config: object) -> TextEncoder:
    return TextEncoder(TokenizerFiles(json.loads(tokenizer.to_str()), config))


def bpe() -> Tokenizer:
    return Tokenizer(models.BPE(VOCAB, [("▁", "a"), ("Ġ", "a")]))


def test_no_dummy_prefix_is_added_by_any_of_its_spellings() -> None:
    metaspace, byte_level, prepend = bpe(), bpe(), bpe()
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    byte_level.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    prepend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    for tokenizer, own, with_space in ((metaspace, 2, 4), (byte_level, 2, 6), (prepend, 2, 4)):
        assert tokenizer.encode("a").ids == [with_space]  # it does add one by itself
        assert encoder(tokenizer).encode("a") == (own,)
        assert encoder(tokenizer).encode(" a") == (with_space,)


def test_bos_is_what_the_tokenizer_puts_first_unless_its_config_says_otherwise() -> None:
    tokenizer = bpe()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert encoder(tokenizer).bos_ids == (0,)
    assert encoder(tokenizer, add_bos_token=False, bos_token="<s>").bos_ids == ()
    assert encoder(tokenizer).eos_ids == ()
    assert encoder(tokenizer, eos_token={"content": "</s>"}).eos_ids == (1,)
    assert encoder(tokenizer).encode("a") == (2,)
    assert 1 not in encoder(tokenizer).encode("a</s>")  # spelled out in a text it is text
    with pytest.raises(NotFound, match="<end>"):
        encoder(tokenizer, eos_token="<end>")


def test_many_texts_are_encoded_as_each_alone() -> None:
    found = word_encoder().encode_all(["w1 w2", "", "w3"])
    assert found == [word_encoder().encode("w1 w2"), (), word_encoder().encode("w3")]


def test_a_model_without_tokenizer_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="tokenizer"):
        TextEncoder.from_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(NotFound, match="tokenizer"):
        TextEncoder.from_model(tmp_path)
