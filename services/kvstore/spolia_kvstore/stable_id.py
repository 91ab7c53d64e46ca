"""The name of a store that has a folder: kept there, so that it is the same store after a restart.

Nodes decide by it where a chunk belongs, and an index that stores share says by it who has what.
"""

from __future__ import annotations

import secrets
from pathlib import Path

FILE_NAME = "node-id"
MAX_CHARS = 128


def stable_id(data_dir: Path) -> str:
    """The id kept in the folder, made and written on first use; empty where the folder cannot be used at all."""
    path = data_dir / FILE_NAME
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(f"kvstore-{secrets.token_hex(4)}\n")
        found = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return found if found.isprintable() and len(found) <= MAX_CHARS else ""
