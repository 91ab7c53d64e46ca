"""What single tokens say adds up to what the text says."""

from __future__ import annotations

import json

import pytest
from gateway_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from tokenizers import Tokenizer, decoders, models

from spolia_gateway.token_texts import TokenTexts

TEXT = "the stones of é 漢字, cut again"


def texts_of(tokenizer: Tokenizer) -> TokenTexts:
    return TokenTexts(json.loads(tokenizer.to_str()), tokenizer.id_to_token)


def test_the_bytes_of_byte_level_tokens_are_the_text() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert b"".join(texts_of(tokenizer).bytes_of(i) for i in ids) == TEXT.encode()
    assert len(ids) < len(TEXT.encode()), "some tokens hold several bytes"


@pytest.mark.parametrize("style", ["metaspace", "prepend"])
def test_the_bytes_of_sentencepiece_tokens_are_the_text(style: str) -> None:
    tokenizer = sentencepiece_tokenizer(style)
    ids = tokenizer.encode("the stones of one", add_special_tokens=False).ids
    assert b"".join(texts_of(tokenizer).bytes_of(i) for i in ids) == b" the stones of one"


def test_byte_pieces_and_special_tokens_are_what_they_stand_for() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<0xE6>": 0, "<0x41>": 1, "\u2581a": 2}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(["<end>"])
    texts = texts_of(tokenizer)
    assert [texts.bytes_of(i) for i in range(5)] == [b"\xe6", b"A", b" a", b"<end>", b""]
    assert [texts.name_of(i) for i in range(4)] == ["bytes:\\xe6", "A", " a", "<end>"]
