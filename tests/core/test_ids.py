"""Ids: the same everywhere and always, and never the same for two different things."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia_core.ids import IdSpace, Placement, Recipe, pack_token_ids, tenant_key
from spolia_core.reuse import PREFIX_CHUNK_TOKENS

KEY = tenant_key(b"secret", "default")
SPACE = IdSpace(KEY, bytes(range(32)), Recipe("float32"))
PLACEMENT = Placement(bytes(32), offset=-5, start=16, end=90, num_link_tokens=16)

GOLDEN = {
    "key": "62395583fa0e6e172635a65f50cf7e3a4d4949d10500b585b224640c972d5585",
    "local": "ef2738c7f36cb49ecd74a3dfc7af60f1fb8d001df837d26f75cc76ff6eb922e4",
    "prefix": "e7cb9694b8b005d0a560996a89c71bd4b823822bf244ed6a106a5b92af24a4a6",
    "second": "7831e8688803adc3cbad13e8d765a5cee2c00c56ed66ba80f1fa3bf0ef0fe4f1",
    "linked": "10a932c6b3a729af588084e5c7ec5aa602669f55c88c8855bd2969ba8017c821",
}


def made() -> dict[str, str]:
    """One id of every kind, as hex."""
    first = SPACE.prefix(None, range(128))
    return {
        "key": KEY.hex(),
        "local": SPACE.local([1, 2, 3]).hex(),
        "prefix": first.hex(),
        "second": SPACE.prefix(first, range(128, 256)).hex(),
        "linked": SPACE.linked(first, [PLACEMENT], "default", [7, 8]).hex(),
    }


def test_ids_are_what_they_have_always_been() -> None:
    """A change here makes every stored chunk unfindable: it belongs with a new format version."""
    assert made() == GOLDEN


def test_another_process_makes_the_same_ids() -> None:
    code = "import test_ids; print(test_ids.made())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=__file__.rpartition("/")[0],
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.strip() == str(made())


def test_kinds_tenants_models_and_recipes_never_share_an_id() -> None:
    keys = [tenant_key(b"secret", name) for name in ("a", "b", "shared", "")] + [tenant_key(b"other", "a")]
    fingerprints = [bytes(32), bytes([1]) + bytes(31), b""]
    recipes = [Recipe("float32"), Recipe("bfloat16"), Recipe("float32", 1), Recipe("float32", 4), Recipe("")]
    tokens = [[1], [1, 2], [2, 1], [258], [0], [0, 0]]
    ids: list[bytes] = []
    for key, fingerprint, recipe, part in product(keys, fingerprints, recipes, tokens):
        space = IdSpace(key, fingerprint, recipe)
        ids += [
            space.local(part),
            space.prefix(None, part),
            space.prefix(bytes(32), part),
            space.linked(None, [], "", part),
            space.linked(bytes(32), [PLACEMENT], "", part),
        ]
    assert len(ids) == len(set(ids))
    assert all(len(chunk_id) == 32 for chunk_id in ids)


def test_no_byte_may_move_from_one_part_of_an_id_to_the_next() -> None:
    ids = [
        IdSpace(KEY, b"ab", Recipe("c")).local([1]),
        IdSpace(KEY, b"a", Recipe("bc")).local([1]),
        IdSpace(KEY, b"abc", Recipe("")).local([1]),
        SPACE.prefix(pack_token_ids([1]), [2]),
        SPACE.prefix(pack_token_ids([1, 2]), []),
        SPACE.prefix(None, [1, 2]),
        SPACE.linked(None, [PLACEMENT], "", []),
        SPACE.linked(None, [], "x" * len(PLACEMENT.pack()), []),
        SPACE.linked(None, [], "xxxx", [1]),
        SPACE.linked(None, [], "", [int.from_bytes(b"xxxx", "little"), 1]),
    ]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "change", [{"chunk_id": bytes([1] * 32)}, {"offset": -4}, {"start": 17}, {"end": 91}, {"num_link_tokens": 15}]
)
def test_a_linked_id_covers_every_word_of_what_stands_before_it(change: dict[str, object]) -> None:
    plain = SPACE.linked(None, [PLACEMENT, PLACEMENT], "default", [1])
    changed = replace(PLACEMENT, **change)  # type: ignore[arg-type]  # fields differ in type
    others = [
        SPACE.linked(None, [PLACEMENT, changed], "default", [1]),
        SPACE.linked(None, [changed, PLACEMENT], "default", [1]),
        SPACE.linked(None, [PLACEMENT], "default", [1]),
        SPACE.linked(None, [PLACEMENT, PLACEMENT], "other", [1]),
    ]
    assert len({plain, *others}) == 5


@given(st.integers(0, 600), st.integers(0, 600))
def test_chains_agree_as_far_as_the_tokens_do(length: int, differs_at: int) -> None:
    one = [i % 50 for i in range(length)]
    two = [token + (i == differs_at) for i, token in enumerate(one)]
    chain, other = list(SPACE.prefix_chain(one)), list(SPACE.prefix_chain(two))
    assert len(chain) == length // PREFIX_CHUNK_TOKENS
    same = min(differs_at // PREFIX_CHUNK_TOKENS, len(chain))
    assert chain[:same] == other[:same]
    assert not set(chain[same:]) & set(other[same:])


@given(st.integers(0, 5))
def test_a_chain_goes_on_where_it_was_left(num_blocks: int) -> None:
    tokens = list(range(700))
    whole = list(SPACE.prefix_chain(tokens))
    cut = num_blocks * PREFIX_CHUNK_TOKENS
    head = list(SPACE.prefix_chain(tokens[:cut]))
    rest = list(SPACE.prefix_chain(tokens[cut:], head[-1] if head else None))
    assert head + rest == whole


def test_equal_blocks_at_different_places_have_different_ids() -> None:
    assert len(set(SPACE.prefix_chain([5] * PREFIX_CHUNK_TOKENS * 6))) == 6


def test_token_ids_are_four_bytes_little_endian() -> None:
    assert pack_token_ids([1, 258, 2**32 - 1]) == b"\x01\0\0\0\x02\x01\0\0\xff\xff\xff\xff"
    for bad in (-1, 2**32):
        with pytest.raises(OverflowError):
            pack_token_ids([bad])


def test_a_salt_makes_other_keys_and_no_salt_the_tenants_own() -> None:
    keys = [tenant_key(b"secret", tenant, salt) for tenant in ("a", "b") for salt in ("", "x", "y", "b")]
    assert len(set(keys)) == len(keys)
    assert tenant_key(b"secret", "default", "") == KEY
    # What a tenant is called cannot stand for another's salt.
    assert tenant_key(b"secret", "a\0x") not in keys
