"""The counter-based generator on a device: the number that `spolia_core.sampling.uniform` gives, bit by bit.

BLAKE2b (RFC 7693) of one block that holds three words, seed, sample index and token index, and zeros; of the digest the
first word. Rounds differ only in where the three words come in, so they are one loop, and their places are packed into
a number for each word, four bits a round.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PERSON = b"spolia.sample".ljust(16, b"\0")
_DIGEST_BYTES, _MESSAGE_BYTES = 8, 24
_VECTOR = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
# Where words 0, 1 and 2 stand in the message schedule of rounds 0 … 9; rounds 10 and 11 are 0 and 1 again.
_PLACES = ((0, 10, 3, 13, 1, 4, 8, 9, 6, 15), (1, 8, 13, 3, 9, 14, 2, 5, 12, 6), (2, 11, 5, 8, 4, 0, 13, 14, 9, 1))


def _packed(places: tuple[int, ...]) -> int:
    return sum(place << 4 * turn for turn, place in enumerate((*places, *places[:2])))


V0: tl.constexpr = tl.constexpr(_VECTOR[0])
V1: tl.constexpr = tl.constexpr(_VECTOR[1])
V2: tl.constexpr = tl.constexpr(_VECTOR[2])
V3: tl.constexpr = tl.constexpr(_VECTOR[3])
V4: tl.constexpr = tl.constexpr(_VECTOR[4])
V5: tl.constexpr = tl.constexpr(_VECTOR[5])
V6: tl.constexpr = tl.constexpr(_VECTOR[6])
V7: tl.constexpr = tl.constexpr(_VECTOR[7])
H0: tl.constexpr = tl.constexpr(_VECTOR[0] ^ 0x01010000 ^ _DIGEST_BYTES)
H6: tl.constexpr = tl.constexpr(_VECTOR[6] ^ int.from_bytes(_PERSON[:8], "little"))
H7: tl.constexpr = tl.constexpr(_VECTOR[7] ^ int.from_bytes(_PERSON[8:], "little"))
COUNTED: tl.constexpr = tl.constexpr(_VECTOR[4] ^ _MESSAGE_BYTES)
LAST: tl.constexpr = tl.constexpr(_VECTOR[6] ^ (2**64 - 1))
PLACES_0: tl.constexpr = tl.constexpr(_packed(_PLACES[0]))
PLACES_1: tl.constexpr = tl.constexpr(_packed(_PLACES[1]))
PLACES_2: tl.constexpr = tl.constexpr(_packed(_PLACES[2]))


@triton.jit
def _mixed(a, b, c, d, x, y):
    """The hash's G: four words stirred with two of the message."""
    a = a + b + x
    d = d ^ a
    d = (d >> 32) | (d << 32)
    c = c + d
    b = b ^ c
    b = (b >> 24) | (b << 40)
    a = a + b + y
    d = d ^ a
    d = (d >> 16) | (d << 48)
    c = c + d
    b = b ^ c
    b = (b >> 63) | (b << 1)
    return a, b, c, d


@triton.jit
def _word(place: tl.constexpr, at_0, at_1, at_2, m0, m1, m2):
    """The message word that a round takes in at `place`; all but three are zero."""
    zero = m0 ^ m0
    return tl.where(at_0 == place, m0, tl.where(at_1 == place, m1, tl.where(at_2 == place, m2, zero)))


@triton.jit
def uniform_of(seed, sample_index, token_index):
    """A number in [0, 1) with 53 random bits, float64, of three 64-bit integers."""
    m0 = seed.to(tl.uint64)
    m1 = sample_index.to(tl.uint64)
    m2 = token_index.to(tl.uint64)
    zero = m0 ^ m0
    a0, a1, a2, a3 = zero + H0, zero + V1, zero + V2, zero + V3
    b0, b1, b2, b3 = zero + V4, zero + V5, zero + H6, zero + H7
    c0, c1, c2, c3 = zero + V0, zero + V1, zero + V2, zero + V3
    d0, d1, d2, d3 = zero + COUNTED, zero + V5, zero + LAST, zero + V7
    for turn in range(12):
        at_0 = (tl.full([], PLACES_0, tl.int64) >> (4 * turn)) & 15
        at_1 = (tl.full([], PLACES_1, tl.int64) >> (4 * turn)) & 15
        at_2 = (tl.full([], PLACES_2, tl.int64) >> (4 * turn)) & 15
        x, y = _word(0, at_0, at_1, at_2, m0, m1, m2), _word(1, at_0, at_1, at_2, m0, m1, m2)
        a0, b0, c0, d0 = _mixed(a0, b0, c0, d0, x, y)
        x, y = _word(2, at_0, at_1, at_2, m0, m1, m2), _word(3, at_0, at_1, at_2, m0, m1, m2)
        a1, b1, c1, d1 = _mixed(a1, b1, c1, d1, x, y)
        x, y = _word(4, at_0, at_1, at_2, m0, m1, m2), _word(5, at_0, at_1, at_2, m0, m1, m2)
        a2, b2, c2, d2 = _mixed(a2, b2, c2, d2, x, y)
        x, y = _word(6, at_0, at_1, at_2, m0, m1, m2), _word(7, at_0, at_1, at_2, m0, m1, m2)
        a3, b3, c3, d3 = _mixed(a3, b3, c3, d3, x, y)
        x, y = _word(8, at_0, at_1, at_2, m0, m1, m2), _word(9, at_0, at_1, at_2, m0, m1, m2)
        a0, b1, c2, d3 = _mixed(a0, b1, c2, d3, x, y)
        x, y = _word(10, at_0, at_1, at_2, m0, m1, m2), _word(11, at_0, at_1, at_2, m0, m1, m2)
        a1, b2, c3, d0 = _mixed(a1, b2, c3, d0, x, y)
        x, y = _word(12, at_0, at_1, at_2, m0, m1, m2), _word(13, at_0, at_1, at_2, m0, m1, m2)
        a2, b3, c0, d1 = _mixed(a2, b3, c0, d1, x, y)
        x, y = _word(14, at_0, at_1, at_2, m0, m1, m2), _word(15, at_0, at_1, at_2, m0, m1, m2)
        a3, b0, c1, d2 = _mixed(a3, b0, c1, d2, x, y)
    digest = (zero + H0) ^ a0 ^ c0
    return (digest >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def uniform_kernel(seeds, sample_indices, token_indices, out, count, BLOCK: tl.constexpr):
    """`uniform_of` the counters of `count` rows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = i < count
    seed, sample_index = tl.load(seeds + i, mask=seen, other=0), tl.load(sample_indices + i, mask=seen, other=0)
    tl.store(out + i, uniform_of(seed, sample_index, tl.load(token_indices + i, mask=seen, other=0)), mask=seen)
