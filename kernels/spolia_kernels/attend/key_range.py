"""Keys that stay where they are while one layer after the other attends them: looked at once, not in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor

from spolia_kernels.attend.cpu import attend_cpu, num_splits
from spolia_kernels.attend.flash_cpu import fits_flash, flash_again
from spolia_kernels.attend.native_cpu import attend_native, native_for
from spolia_kernels.attend.products_cpu import attend_products, products_pay
from spolia_kernels.attend.reference import attend_ref
from spolia_kernels.partial import Partial


class _Way(Enum):
    """How queries of one shape attend a layer's keys."""

    ONE_CALL = "one call of the fused kernel"
    NATIVE = "our own machine code"
    PRODUCTS = "products"
    ANY = "as attend chooses"


class KeyRange:
    """The keys and values of every layer of a range, for queries of one shape.

    `attend`'s checks and choices take 20 us of Python, as long as the fused kernel takes to be called. Here they are
    made for the first query, and hold for all layers.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """A tensor a layer, alike in shape, strides and dtype: [num_kv_heads, num_keys, …], num_keys > 0."""
        self._keys = [key[None] for key in keys]
        self._values = [value[None] for value in values]
        self._way: _Way | None = None

    def attend(self, layer: int, query: Tensor, *, sm_scale: float) -> Partial:
        """Computes `attend` of query [num_q_heads, num_rows, head_dim] over a layer's keys. Queries have one shape."""
        key, value = self._keys[layer], self._values[layer]
        if self._way is None:
            self._way = _way_of(query, key, value)
        if self._way is _Way.ANY:
            kernel = attend_cpu if query.device.type == "cpu" else attend_ref
            return kernel(query, key[0], value[0], sm_scale=sm_scale)
        # The rows of one GQA group are stacked under their KV head, as in `attend_cpu`.
        stacked = query.reshape(key.shape[1], -1, key.shape[3])
        if self._way is _Way.NATIVE:
            here = native_for(stacked, key[0], value[0])
            assert here is not None, "it was there for the first layer"
            found = attend_native(here, stacked, key[0], value[0], sm_scale=sm_scale)
        elif self._way is _Way.PRODUCTS:
            found = attend_products(stacked, key[0], value[0], sm_scale=sm_scale)
        else:
            out, lse = flash_again(stacked[None], key, value, sm_scale=sm_scale)
            found = Partial(out[0], lse[0])
        if key.shape[1] == query.shape[0]:
            return found
        return Partial(found.out.reshape(*query.shape[:2], -1), found.lse.reshape(query.shape[:2]))


def _way_of(query: Tensor, key: Tensor, value: Tensor) -> _Way:
    if query.numel() == 0 or query.stride(-1) != 1 or not fits_flash(query, key, value):
        return _Way.ANY
    stacked = query.reshape(key.shape[1], -1, key.shape[3])
    if native_for(stacked, key[0], value[0]) is not None:
        return _Way.NATIVE
    if products_pay(stacked, key[0]):
        return _Way.PRODUCTS
    return _Way.ONE_CALL if num_splits(key.shape[1], stacked.shape[1], key.shape[2]) == 1 else _Way.ANY
