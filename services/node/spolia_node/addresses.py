"""Addresses as settings write them: "host:port", several with commas between."""

from __future__ import annotations


def addresses_in(text: str) -> tuple[str, ...]:
    """The addresses of a list, in order; spaces around them do not count. None for empty text."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def is_address(text: str) -> bool:
    """Whether `text` is "host:port"."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536
