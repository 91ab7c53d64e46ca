"""Keys that stay where they are while one layer after the other attends them: looked at once, not in every layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spolia_kernels.attend.cpu import attend_cpu, num_splits
from spolia_kernels.attend.flash_cpu import fits_flash, flash_again
from spolia_kernels.attend.products_cpu import products_pay
from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.partial import Partial


class KeyRange:
    """The keys and values of every layer of a range, for queries of one shape.

    `attend`'s checks and choices take 20 us of Python, as long as the fused kernel takes to be called. Here they are
    made for the first query, and hold for all layers.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """A tensor a layer, alike in shape, strides and dtype: [num_kv_heads, num_keys, …], num_keys > 0."""
        self._keys = [key[None] for key in keys]
        self._values = [value[None] for value in values]
        self._is_one_call: bool | None = None

    def attend(self, layer: int, query: Tensor, *, sm_scale: float) -> Partial:
        """Computes `attend` of query [num_q_heads, num_rows, head_dim] over a layer's keys. Queries have one shape."""
        key, value = self._keys[layer], self._values[layer]
        if self._is_one_call is None:
            self._is_one_call = _is_one_call(query, key, value)
        if not self._is_one_call:
            kernel = attend_cpu if query.device.type == "cpu" else attend_ref
            return kernel(query, key[0], value[0], sm_scale=sm_scale)
        # The rows of one GQA group are stacked under their KV head, as in `attend_cpu`.
        out, lse = flash_again(query.reshape(1, key.shape[1], -1, key.shape[3]), key, value, sm_scale=sm_scale)
        if key.shape[1] == query.shape[0]:
            return Partial(out[0], lse[0])
        return Partial(out.reshape(*query.shape[:2], -1), lse.reshape(query.shape[:2]))


def _is_one_call(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.numel() == 0 or query.stride(-1) != 1 or not fits_flash(query, key, value):
        return False
    stacked = query.reshape(key.shape[1], -1, key.shape[3])
    return not products_pay(stacked, key[0]) and num_splits(key.shape[1], stacked.shape[1], key.shape[2]) == 1
