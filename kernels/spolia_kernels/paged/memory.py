"""KV memory in slots: one slot a token, taken page by page."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PagedKv:
    """One layer's KV. `key` and `value` are [num_kv_heads, num_slots, head_dim], contiguous; keys rotate as runs say.

    A page is `page_size` slots, page p the slots from p · page_size on: tails take pages in any order, and pages that
    follow each other are one stretch of memory in every head, which is how spans are read.
    """

    key: Tensor
    value: Tensor
    page_size: int

    def __post_init__(self) -> None:
        if self.key.ndim != 3 or self.key.shape != self.value.shape:
            raise ValueError(f"key {tuple(self.key.shape)} and value {tuple(self.value.shape)} in one set of slots")
        if not (self.key.is_contiguous() and self.value.is_contiguous()):
            raise ValueError("slots are contiguous")
        if self.page_size & (self.page_size - 1) or self.page_size < 16 or self.num_slots % self.page_size:
            raise ValueError(f"{self.num_slots} slots in pages of {self.page_size}, which is a power of two from 16 on")

    @property
    def num_slots(self) -> int:
        """Tokens that there is room for."""
        return self.key.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.key.shape[0]

    @property
    def head_dim(self) -> int:
        """Numbers of one head's key."""
        return self.key.shape[2]

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> PagedKv:
        """Slots of zeros: what was not written yet may be read, and is hidden by a mask then."""
        shape = (num_kv_heads, num_pages * page_size, head_dim)
        key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(key, value, page_size)

    def slots_of(self, pages: Tensor) -> Tensor:
        """The slots of pages one after the other, int64."""
        return (pages.long()[:, None] * self.page_size + torch.arange(self.page_size, device=pages.device)).flatten()
