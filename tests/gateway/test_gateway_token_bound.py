"""A text that no context could hold is refused before it is encoded, and one that may fit never is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer
from gateway_worlds import LAWFUL
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from spolia_core.errors import InvalidRequest
from spolia_gateway.limits import check_may_fit
from spolia_gateway.token_bound import NFC_SHRINKS_BY, max_bytes_per_token

SHRINKING = "\u1fbe\u0308\u0301"  # becomes one character of two bytes


def bound(tokenizer: Tokenizer) -> int | None:
    return max_bytes_per_token(json.loads(tokenizer.to_str()))


def nfc() -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Like Llama 2's: spaces become "▁", which is longer, and what has no entry becomes bytes."""
    entries = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "s", "t", "st"]
    vocab = {entry: index for index, entry in enumerate(entries)}
    model = models.BPE(vocab=vocab, merges=[("s", "t")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


TOKENIZERS = {"plain": byte_level_tokenizer(), "nfc": nfc(), "byte_fallback": byte_fallback()}


@LAWFUL
@given(name=st.sampled_from(sorted(TOKENIZERS)), text=st.text(st.characters() | st.sampled_from(" st" + SHRINKING)))
def test_no_token_stands_for_more_bytes(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    most = bound(tokenizer)
    assert most is not None
    assert len(text.encode()) <= most * len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_a_composing_normalizer_loosens_the_bound() -> None:
    plain, loose = bound(TOKENIZERS["plain"]), bound(TOKENIZERS["nfc"])
    assert plain is not None
    assert loose == NFC_SHRINKS_BY * plain
    shrunk = normalizers.NFC().normalize_str(SHRINKING)
    assert len(SHRINKING.encode()) / len(shrunk.encode()) == 3.5


@pytest.mark.parametrize("style", ["metaspace", "first", "prepend"])
def test_a_tokenizer_that_folds_unknown_characters_has_none(style: str) -> None:
    assert bound(sentencepiece_tokenizer(style)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.Replace("  ", " ")},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])},
        {"pre_tokenizer": None},
    ],
)
def test_a_tokenizer_that_may_drop_text_has_none(change: dict[str, Any]) -> None:
    tokenizer = byte_level_tokenizer()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    assert bound(tokenizer) is None


def test_added_tokens_count_and_those_that_strip_forbid_a_bound() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<a rather long special token>"])
    assert bound(tokenizer) == len("<a rather long special token>")
    tokenizer.add_special_tokens([AddedToken("<pad>", lstrip=True)])
    assert bound(tokenizer) is None


def test_the_refusal_has_both_numbers() -> None:
    check_may_fit(80, "parts", max_context_tokens=10, max_bytes_per_token=8)
    check_may_fit(81, "parts", max_context_tokens=10, max_bytes_per_token=None)
    with pytest.raises(InvalidRequest) as caught:
        check_may_fit(81, "parts", max_context_tokens=10, max_bytes_per_token=8)
    assert (caught.value.field, caught.value.limit, caught.value.actual) == ("parts", "80 bytes", "81 bytes")
