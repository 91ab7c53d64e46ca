"""Addresses as settings and records write them: "host:port", several with commas between."""

from __future__ import annotations

MAX_PORT = 65535


def addresses_in(text: str) -> tuple[str, ...]:
    """The addresses of a list, in order; spaces around them do not count. None for empty text."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def is_address(text: str) -> bool:
    """Whether peers can be told to connect to this: "host:port", an IPv6 host in brackets."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= MAX_PORT):
        return False
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host.replace(":", " ")
    return bool(bare) and bare.isprintable() and not any(character in bare for character in " /@[]")
