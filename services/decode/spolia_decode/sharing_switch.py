"""Which switch between shared and private treatment a node uses."""

from __future__ import annotations

from spolia_decode.config import DecodeConfig
from spolia_engine.core import EngineCore
from spolia_engine.sharing import Sharing, always_shared, never_shared
from spolia_engine.sharing_table import load_sharing


def load_switch(config: DecodeConfig, engine: EngineCore) -> Sharing:
    """As the settings say. Where it is to be measured and no table of this device is kept, takes a second."""
    if config.sharing == "measured":
        return load_sharing(engine.attention_shape, config.tables_dir.expanduser(), engine.adapter.device)
    return always_shared if config.sharing == "always" else never_shared
