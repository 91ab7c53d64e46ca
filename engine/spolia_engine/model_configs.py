"""transformers' configurations, without the half of torch that checking one name would bring along.

`transformers.utils.type_validators`, which every configuration imports, imports all activations where there is torch,
to refuse a config whose activation it does not know; and they import torch's compiler and distributed tensors: 1.2 s of
processor time and 160 MiB of every engine. Where there is no torch it leaves that check out. So that is what it is
told, while it is imported and nothing else is. Activations are checked here instead (`known_activation`). A release of
transformers that is laid out otherwise is imported as it comes, and takes what it takes (5.17 does, 5.23 does not).
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress

from transformers.utils import import_utils

VALIDATORS = "transformers.utils.type_validators"
IMPORTED_BY_IT = (
    "transformers.tokenization_utils_base",
    "transformers.image_utils",
    "transformers.video_utils",
    "transformers.utils.generic",
)
"""These are told the truth: they come first."""
ACTIVATION = "silu"
"""The one that Llama and its kin come with."""


def known_activation(name: object) -> bool:
    """Whether transformers has an activation of that name."""
    if name == ACTIVATION:
        return True
    from transformers.activations import ACT2FN

    return name in ACT2FN


def _import_validators() -> None:
    if VALIDATORS in sys.modules:
        return
    try:
        for name in IMPORTED_BY_IT:
            importlib.import_module(name)
    except ModuleNotFoundError:
        return
    is_torch_available = import_utils.is_torch_available
    import_utils.is_torch_available = lambda: False
    try:
        importlib.import_module(VALIDATORS)
    except ModuleNotFoundError:
        return
    finally:
        import_utils.is_torch_available = is_torch_available


with suppress(ModuleNotFoundError):  # a version without such a module: a test says whether it is as light
    _import_validators()

from transformers import CONFIG_MAPPING, AutoConfig  # noqa: E402  (they import the validators)

__all__ = ["ACTIVATION", "CONFIG_MAPPING", "AutoConfig", "known_activation"]
