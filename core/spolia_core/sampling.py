"""How the next token is drawn, and the counter-based generator that makes replays draw the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

from spolia_core.constraint import Constraint
from spolia_core.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_SAMPLES = 64
MAX_TOP_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 keeps all; `top_p` 1 keeps all."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_samples: int = 1
    """Answers drawn from one prompt; sample i draws the numbers of index i."""
    num_top_logprobs: int | None = None
    """Likeliest tokens told beside each one drawn, all with their log-probabilities; None tells none."""
    constraint: Constraint | None = None
    """What every answer must match; None: nothing."""

    def validate(self) -> None:
        """Raises `InvalidRequest` naming the first bad field, its limit and its value."""
        t, p = self.temperature, self.top_p
        _check(math.isfinite(t) and 0 <= t <= 100, "sampling.temperature", "0 … 100", t)
        _check(math.isfinite(p) and 0 < p <= 1, "sampling.top_p", "(0, 1]", p)
        _check(self.top_k >= 0, "sampling.top_k", "≥ 0", self.top_k)
        _check(0 <= self.seed < 2**64, "sampling.seed", "0 … 2^64 - 1", self.seed)
        _check(self.max_tokens >= 1, "sampling.max_tokens", "≥ 1", self.max_tokens)
        _check(1 <= self.num_samples <= MAX_SAMPLES, "sampling.num_samples", f"1 … {MAX_SAMPLES}", self.num_samples)
        top = self.num_top_logprobs
        _check(top is None or 0 <= top <= MAX_TOP_LOGPROBS, "sampling.num_top_logprobs", f"0 … {MAX_TOP_LOGPROBS}", top)
        _check(
            len(self.stop) <= MAX_STOP_STRINGS,
            "sampling.stop",
            f"≤ {MAX_STOP_STRINGS} strings",
            len(self.stop),
        )
        for text in self.stop:
            size = len(text.encode())
            _check(1 <= size <= MAX_STOP_BYTES, "sampling.stop", f"1 … {MAX_STOP_BYTES} bytes each", size)
        if self.constraint is not None:
            _check(not self.ignore_eos, "sampling.ignore_eos", f"false beside {self.constraint.field}", True)
            self.constraint.validate()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _check(ok: bool, field: str, limit: str, actual: object) -> None:
    if not ok:
        raise InvalidRequest(f"{field} must be {limit}, got {actual}", field=field, limit=limit, actual=str(actual))


def uniform(seed: int, sample_index: int, token_index: int) -> float:
    """A number in [0, 1) that depends on its arguments only, with 53 random bits.

    Counter-based: token i of sample j draws the same number on every node, in every batch and on every replay.
    BLAKE2b of the counter stands in for Philox (Salmon et al. 2011): one draw per token, so speed does not matter and
    a library hash beats a generator of our own.
    """
    counter = seed.to_bytes(8, "little") + sample_index.to_bytes(8, "little") + token_index.to_bytes(8, "little")
    digest = blake2b(counter, digest_size=8, person=b"spolia.sample").digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
