"""The laws of rotary rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_worlds import LAWFUL, largest, poisoned
from torch import Tensor

from spolia_kernels import RotaryTable, Rotation, rotate
from spolia_kernels.rotate import rotate_ref

HEAD_DIM = 64
positions_ = st.integers(-30_000, 30_000)


def frequencies(rotary_dim: int, base: float = 10_000.0) -> Tensor:
    return base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def table(rotary_dim: int = HEAD_DIM, *, head_dim: int = HEAD_DIM, max_position: int = 64) -> RotaryTable:
    return RotaryTable(frequencies(rotary_dim), head_dim=head_dim, max_position=max_position, device="cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Vectors of length about 1, so that an error in them is an error in a score."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def turned(x: Tensor, positions: Tensor, rotary_dim: int) -> Tensor:
    """Rotation as a product of complex numbers in float64: x_i + i x_{i+h} turns by position * inv_freq_i."""
    half = rotary_dim // 2
    x = x.double()
    pairs = torch.complex(x[..., :half], x[..., half:rotary_dim])
    angles = positions.double()[:, None] * frequencies(rotary_dim)
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag, x[..., rotary_dim:]], dim=-1)


@LAWFUL
@given(positions=st.lists(positions_, min_size=0, max_size=9), rotary_dim=st.sampled_from((64, 32, 2)))
def test_rotate_turns_complex_pairs_by_their_angles(positions, rotary_dim):
    at = torch.tensor(positions, dtype=torch.int64)
    x = drawn(3, len(positions), HEAD_DIM)
    wanted = turned(x, at, rotary_dim)
    rotary = table(rotary_dim)
    for got in (rotate(x, at, rotary), rotate_ref(x, at, rotary)):
        assert got.dtype == torch.float32
        assert largest(got.double() - wanted) < 1e-6
    assert largest(rotate(x.double(), at, rotary) - wanted) < 1e-12
    assert torch.equal(rotate(x, at, rotary)[..., rotary_dim:], x[..., rotary_dim:])


@LAWFUL
@given(a=positions_, b=positions_)
def test_rotations_add_up(a, b):
    """R(a) R(b) = R(a + b), with a + b up to 60,000 and of either sign."""
    x, rotary = drawn(2, 1, HEAD_DIM), table()
    at_a, at_b = torch.tensor([a]), torch.tensor([b])
    together = rotate(x, at_a + at_b, rotary)
    assert largest(rotate(rotate(x, at_b, rotary), at_a, rotary) - together) < 1e-6
    assert largest(rotate(rotate(x, at_a, rotary), -at_a, rotary) - x) < 1e-6


@LAWFUL
@given(p=positions_, offset=st.integers(0, 30_000), j=st.integers(0, 4_000), seed=st.integers(0, 99))
def test_a_query_rotated_back_by_the_offset_sees_the_key_where_it_was_stored(p, offset, j, seed):
    """(R(p) q) . (R(d + j) k) = (R(p - d) q) . (R(j) k), both against float64."""
    q, k, rotary = drawn(1, 1, HEAD_DIM, seed=seed), drawn(1, 1, HEAD_DIM, seed=seed + 100), table()
    at_p, at_j = torch.tensor([p]), torch.tensor([j])
    exact = (turned(q, at_p, HEAD_DIM) * turned(k, at_j + offset, HEAD_DIM)).sum()
    moved_key = (rotate(q, at_p, rotary) * rotate(k, at_j + offset, rotary)).sum()
    moved_query = (rotate(q, at_p - offset, rotary) * rotate(k, at_j, rotary)).sum()
    assert abs(moved_key.double() - exact) < 1e-6
    assert abs(moved_query.double() - exact) < 1e-6


def test_position_zero_is_the_identity_to_the_bit():
    x = drawn(2, 3, HEAD_DIM)
    assert torch.equal(rotate(x, torch.zeros(3, dtype=torch.int64), table()), x)


def test_rows_rotate_the_same_alone_and_together():
    x, at, rotary = drawn(2, 5, HEAD_DIM), torch.tensor([4, -7, 0, 900, 4]), table()
    together = rotate(x, at, rotary)
    for row in range(5):
        alone = rotate(x[:, row : row + 1], at[row : row + 1], rotary)
        assert torch.equal(alone, together[:, row : row + 1])


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 5e-3), (torch.float16, 5e-4)])
def test_16_bit_inputs_are_rotated_in_float32_and_rounded_once(dtype, error):
    x, at, rotary = drawn(2, 3, HEAD_DIM).to(dtype), torch.tensor([3, -900, 20_000]), table()
    got = rotate(x, at, rotary)
    assert got.dtype == dtype
    assert torch.equal(got, rotate(x.float(), at, rotary).to(dtype))
    assert largest(got.double() - turned(x, at, HEAD_DIM)) < error


def test_views_are_read_right_and_left_unchanged():
    x = poisoned(drawn(2, 3, HEAD_DIM))
    before, at = x.clone(), torch.tensor([1, -2, 30])
    wanted = rotate(before, at, table())
    assert torch.equal(rotate(x, at, table()), wanted)
    assert torch.equal(rotate(x.transpose(0, 1).contiguous().transpose(0, 1), at, table()), wanted)
    assert torch.equal(x, before)


def test_a_lookup_kept_for_a_step_rotates_the_same():
    x, at, rotary = drawn(2, 3, HEAD_DIM), torch.tensor([1, -2, 30]), table(32)
    assert torch.equal(Rotation.to(at, rotary)(x), rotate(x, at, rotary))


def test_few_numbers_and_many_are_rotated_to_the_same_bits():
    many, rotary = drawn(4, 1000, HEAD_DIM), table()
    at = torch.arange(-500, 500)
    whole = rotate(many, at, rotary)
    few = slice(490, 510)
    assert torch.equal(rotate(many[:, few], at[few], rotary), whole[:, few])


@pytest.mark.parametrize("num_rows", [3, 2000])
def test_rows_are_picked_and_then_turned(num_rows):
    x, rows = drawn(4, num_rows, HEAD_DIM), torch.tensor([2, 0, 2, 1])
    rotation = Rotation.to(torch.tensor([5, -7, 0, 900]), table())
    assert torch.equal(rotation(x, rows), rotation(x[:, rows]))


@pytest.mark.parametrize("num_rows", [1, 3, 32])
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 32])
def test_groups_turn_as_their_rows_do(num_rows, rotary_dim):
    positions = torch.arange(3 * num_rows) * 7 - 40
    rotation = Rotation.to(positions, table(rotary_dim))
    for x in (drawn(2, num_rows, HEAD_DIM), drawn(num_rows, 2, HEAD_DIM).transpose(0, 1)):
        got = rotation.of_groups(x)
        assert got.shape == (3, 2, num_rows, HEAD_DIM)
        assert got.stride(-1) == 1
        wanted = rotation(x, torch.arange(num_rows).repeat(3)).unflatten(1, (3, num_rows)).transpose(0, 1)
        torch.testing.assert_close(got, wanted)


def test_one_row_turns_all_alike_and_a_scale_scales():
    x, rotary = drawn(2, 5, HEAD_DIM), table()
    alike = Rotation.to(torch.tensor([9]), rotary)(x)
    assert torch.equal(alike, rotate(x, torch.full((5,), 9), rotary))
    assert torch.equal(Rotation.to(torch.tensor([9]), rotary, scale=2.0)(x), 2 * alike)


@pytest.mark.parametrize("max_position", [0, 1, 63, 64, 100])
def test_the_table_grows_to_any_position_and_keeps_its_entries(max_position):
    rotary = table(max_position=max_position)
    assert rotary.max_position == max_position
    first = rotary.cos_sin(torch.arange(max_position + 1))
    cos, sin = rotary.cos_sin(torch.tensor([70_000, -70_000]))
    assert rotary.max_position >= 70_000
    angles = 70_000 * frequencies(HEAD_DIM)
    assert largest(cos[0].double() - angles.cos()) < 1e-7
    assert largest(sin[0].double() - angles.sin()) < 1e-7
    assert torch.equal(cos[1], cos[0])
    assert torch.equal(sin[1], -sin[0])
    again = rotary.cos_sin(torch.arange(max_position + 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_the_table_does_not_grow_for_positions_it_holds():
    rotary = table(max_position=64)
    rotary.cos_sin(torch.tensor([64, -64]))
    assert rotary.max_position == 64
    rotary.cos_sin(torch.tensor([-65]))
    assert rotary.max_position == 129


def test_no_positions_give_no_rows():
    cos, sin = table().cos_sin(torch.empty(0, dtype=torch.int64))
    assert cos.shape == sin.shape == (0, HEAD_DIM // 2)
    assert rotate(drawn(2, 0, HEAD_DIM), torch.empty(0, dtype=torch.int64), table()).shape == (2, 0, HEAD_DIM)


def test_float32_frequencies_are_not_rounded_again():
    inv_freq = frequencies(HEAD_DIM).float()
    rotary = RotaryTable(inv_freq, head_dim=HEAD_DIM, max_position=8, device="cpu")
    cos, _ = rotary.cos_sin(torch.tensor([30_000]))
    assert largest(cos[0].double() - (30_000 * inv_freq.double()).cos()) < 1e-7


def test_what_does_not_fit_is_refused():
    rotary = table(32)
    with pytest.raises(ValueError, match="one per row"):
        rotate(drawn(2, 3, HEAD_DIM), torch.tensor([1, 2]), rotary)
    with pytest.raises(ValueError, match="int64"):
        rotate(drawn(2, 1, HEAD_DIM), torch.tensor([1], dtype=torch.int32), rotary)
    with pytest.raises(ValueError, match="int64"):
        rotary.cos_sin(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="num_heads"):
        rotate(drawn(2, 1, 32), torch.tensor([1]), rotary)
    with pytest.raises(ValueError, match="does not fit"):
        RotaryTable(frequencies(64), head_dim=32, max_position=8, device="cpu")
    with pytest.raises(ValueError, match="negative"):
        RotaryTable(frequencies(64), head_dim=64, max_position=-1, device="cpu")
