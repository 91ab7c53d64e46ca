"""The numbers that kernels compute with, in the order of the table they read them from."""

from __future__ import annotations

MAGIC = 12582912.0
"""1.5 · 2^23: a float this large has no fraction."""
MIN_EXPONENT = -126.0
"""Of the smallest float that is not denormal."""
EXPONENT_BIAS = 127.0
"""What a float's exponent is stored with."""
LOWEST = -3.0e38
"""Below every score."""
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
"""2^x for |x| ≤ 1/2, the highest power first: the minimax polynomial of degree 6, off by 2e-8 of the result."""

LANE_NUMBERS = tuple(float(lane) for lane in range(16))
"""Of the lanes of the widest vector; they stand side by side."""

NUMBERS = (MAGIC, MIN_EXPONENT, EXPONENT_BIAS, LOWEST, LOG2_E, LN_2, *EXP2[:-1], *LANE_NUMBERS)
"""EXP2's last is a lane's."""
