"""The name of a store that has a folder: kept there, so that it is the same store after a restart.

Nodes decide by it where a chunk belongs, and an index that stores share says by it who has what.
"""

from __future__ import annotations

import secrets
from pathlib import Path

FILE_NAME = "node-id"
MAX_CHARS = 128


def stable_id(data_dir: Path) -> str:
    """The id kept in the folder, made where there is none; empty where the folder cannot be used at all."""
    path = data_dir / FILE_NAME
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        found = path.read_bytes().decode(errors="replace").strip() if path.exists() else ""
        if not (found.isascii() and found.isprintable() and 0 < len(found) <= MAX_CHARS):
            found = f"kvstore-{secrets.token_hex(4)}"
            unfinished = path.with_suffix(".new")
            unfinished.write_text(f"{found}\n")
            unfinished.replace(path)
    except OSError:
        return ""
    return found
