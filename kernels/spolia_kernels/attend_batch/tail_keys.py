"""Tails that one layer after the other attends: looked at once a step, not in every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spolia_kernels.attend.flash_cpu import fits_flash, flash_again
from spolia_kernels.attend_batch.cpu import attend_batch_cpu, is_split
from spolia_kernels.attend_batch.lens import BatchLens, Cut
from spolia_kernels.attend_batch.reference import attend_batch_ref
from spolia_kernels.partial import Partial


class TailKeys:
    """The keys and values of every layer of a batch of tails, for queries of one shape. `begin` comes first, each step.

    `attend_batch`'s checks and views take 80 us of a layer. Where one call does it, they are made here for all layers.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        """[num_layers, batch, num_kv_heads, max_keys, …], of one dtype."""
        self._memory = (key, value)
        self._key_bytes = key.shape[2] * (key.shape[4] + value.shape[4]) * key.element_size()
        self.begin([0] * key.shape[1])
        self._fits_flash: bool | None = None

    def begin(self, lens: Sequence[int]) -> None:
        """Each sequence's number of keys in this step, from 0 on. Raises ValueError for one that has not the room."""
        key = self._memory[0]
        self.lens = BatchLens.of(lens, key_bytes=self._key_bytes, dtype=key.dtype, device=key.device)
        if self.lens.longest > key.shape[3]:
            raise ValueError(f"lens up to {self.lens.longest}, key holds {key.shape[3]}")
        self._cut: Cut | None = None
        if len(self.lens.cuts) == 1 and self.lens.longest and not is_split(self.lens.cuts[0]):
            self._cut = self.lens.cuts[0]
        seen = slice(self.lens.longest)
        self._keys, self._values = (memory[:, :, :, seen].unbind(0) for memory in self._memory)

    def attend(self, layer: int, query: Tensor, *, sm_scale: float) -> Partial:
        """Computes `attend_batch` of query [batch, num_q_heads, head_dim] over a layer's keys."""
        key, value, cut = self._keys[layer], self._values[layer], self._cut
        batch, num_q_heads, head_dim = query.shape
        if cut is not None and query.stride(2) == 1:
            grouped = query.reshape(batch, key.shape[1], -1, head_dim)
            if self._fits_flash is None:
                self._fits_flash = fits_flash(grouped, key, value)
            if self._fits_flash:
                out, lse = flash_again(grouped, key, value, sm_scale=sm_scale, mask=cut.mask)
                out = out.reshape(batch, num_q_heads, value.shape[3])
                return Partial(out.transpose(0, 1), lse.reshape(batch, num_q_heads).t())
        if query.device.type == "cpu":
            return attend_batch_cpu(query, key, value, self.lens, sm_scale=sm_scale)
        return attend_batch_ref(query, key, value, self.lens.lens, sm_scale=sm_scale)
