"""Paged KV memory: pages of equal size, taken in any order by whoever needs one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PagedKv:
    """One layer's KV. `key` and `value` are [num_pages, num_kv_heads, page_size, head_dim], contiguous.

    A page holds `page_size` consecutive tokens of one run, all KV heads; keys are rotated to wherever their run says.
    """

    key: Tensor
    value: Tensor

    def __post_init__(self) -> None:
        if self.key.ndim != 4 or self.key.shape != self.value.shape:
            raise ValueError(f"pages of key {tuple(self.key.shape)} and value {tuple(self.value.shape)}")
        if not (self.key.is_contiguous() and self.value.is_contiguous()):
            raise ValueError("pages are contiguous")
        if self.page_size & (self.page_size - 1) or self.page_size < 16:
            raise ValueError(f"page_size is a power of two from 16 on; got {self.page_size}")

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[2]

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        """Numbers of one head's key."""
        return self.key.shape[3]

    @classmethod
    def empty(
        cls,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> PagedKv:
        """Pages of zeros: what was not written yet may be read, and is hidden by a mask then."""
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def gather(self, pages: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Tokens `start` … `end` of the pages one after the other: key and value [num_kv_heads, end - start, head_dim],
        copies.
        """
        wide = pages.long()
        return tuple(
            memory[wide].transpose(0, 1).reshape(self.num_kv_heads, -1, self.head_dim)[:, start:end]
            for memory in (self.key, self.value)
        )  # type: ignore[return-value]
