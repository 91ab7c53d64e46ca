"""Standard output that cannot write every character."""

from __future__ import annotations

import codecs
import io
import sys

IN_ASCII = {"Δ": "d", "–": "-", "−": "-", "≥": ">=", "≤": "<=", "…": "...", "×": "x"}
"""The signs that tables and notes use, for an encoding that has none of them."""
HANDLER = "spolia-in-ascii"


def speak_any_encoding() -> None:
    """From here on, what standard output's encoding lacks is written in its stead, not raised as an error."""
    codecs.register_error(HANDLER, _in_ascii)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=HANDLER)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(IN_ASCII.get(letter, "?") for letter in text), error.end
