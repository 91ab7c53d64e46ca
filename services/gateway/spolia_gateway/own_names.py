"""The names under which this server answers where it asks nobody for a key: those of its machine.

Where only this machine can connect, whoever connects counts as its user. A browser breaks that: a page of anywhere,
shown on this machine, has it send requests. Two headers give such a page away, and no page can change them.

    Host     what the browser believes to talk to. A page of evil.example whose name was made to mean 127.0.0.1 (DNS
             rebinding) could read every answer as its own server's; its requests say `host: evil.example`.
    Origin   whose page sends it. A page may send what a form can to any address, though it reads no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

ANY = "*"
MAX_SHOWN_CHARS = 100

_HOST = re.compile(r"(?:\[(?P<in_brackets>[0-9a-f:.%]+)\]|(?P<name>[^\s:\[\]/@?#]+))(?::\d{0,5})?", re.ASCII)
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Stranger:
    """What gave away that a request is not this machine's own."""

    header: str
    value: str


class OwnNames:
    """Knows loopback addresses, `localhost` and what ends with it, and the names that it is given."""

    def __init__(self, others: Iterable[str]) -> None:
        """`others` are further names and addresses, without ports; `ANY` among them stands for all."""
        self._others = frozenset(_plain(name) for name in others)

    def stranger(self, host: str | None, origin: str | None) -> Stranger | None:
        """What is wrong with these headers; None where nothing is.

        HTTP/1.0 may leave Host out, which no browser does; only browsers tell an origin.
        """
        if ANY in self._others:
            return None
        if host is not None and not self._is_own(_host_in(host)):
            return Stranger("host", host[:MAX_SHOWN_CHARS])
        if origin is not None and not self._is_own(_host_of_page(origin)):
            return Stranger("origin", origin[:MAX_SHOWN_CHARS])
        return None

    def _is_own(self, name: str) -> bool:
        return name == "localhost" or name.endswith(".localhost") or _is_loopback(name) or name in self._others


def is_host_name(text: str) -> bool:
    """Whether it is a name or an address as `OwnNames` takes one."""
    return text == ANY or bool(_NAME.fullmatch(_plain(text))) or _is_address(_plain(text))


def _host_in(header: str) -> str:
    """The name in a Host header, without its port; empty where there is none, or it is no such header."""
    found = _HOST.fullmatch(header.strip().lower())
    return "" if found is None else _plain(found["in_brackets"] or found["name"])


def _host_of_page(origin: str) -> str:
    """The name of the place that a page is of, whatever the scheme: an extension's is its id. Empty for `null`, which
    is a page of nowhere, in a frame without rights for one.
    """
    try:
        return _plain(urlsplit(origin.strip()).hostname or "")
    except ValueError:  # brackets that hold no address
        return ""


def _plain(name: str) -> str:
    return name.lower().removeprefix("[").removesuffix("]").removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
