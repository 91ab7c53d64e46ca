"""What a probe is told: a node's own settings, of which it needs few, and what to ask."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NoReturn

from spolia_core.errors import InvalidRequest
from spolia_core.node_name import NODE_ROLES
from spolia_node.settings import between, one_of, setting, settings_of

DEFAULT_TIMEOUT_S = 3.0
_OF_THE_NODE = ("host", "port", "tls_dir", "public_tls_dir")


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of one probe. The first four are the node's and are read from its environment; the rest are flags."""

    host: str = setting("127.0.0.1", "Address the node listens on; 0.0.0.0 and :: are asked on loopback.")
    port: int = setting(0, "Port the node listens on. Required.", check=between(1, 65535))
    tls_dir: Path | None = setting(None, "Folder with the node's certificate, which the probe shows as its own.")
    public_tls_dir: Path | None = setting(None, "A gateway's folder with the certificate that users are shown.")
    role: str = setting(
        "",
        f"Role of the node: {', '.join(NODE_ROLES)}; empty: that of the certificate in tls_dir.",
        check=one_of("", *NODE_ROLES),
    )
    service: str = setting("", "Full name of the gRPC service to ask about; empty: all the node does.")
    alive: bool = setting(False, "Succeed with NOT_SERVING too, not with an error. For what restarts nodes.")
    timeout_s: float = setting(DEFAULT_TIMEOUT_S, "Seconds the answer may take.", check=between(0.01, 3600.0))

    @property
    def address(self) -> str:
        """Where the node is asked, "host:port"."""
        host = _connectable(self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


def read_settings(argv: Sequence[str], environ: Mapping[str, str]) -> ProbeSettings:
    """Flag over environment over default. Raises `InvalidRequest` for the first that is wrong."""
    flags = vars(_parser().parse_args(argv))
    values: dict[str, Any] = {}
    for item in settings_of(ProbeSettings):
        source, text = item.flag, flags[item.name]
        if text is None and item.name in _OF_THE_NODE:
            source, text = item.env, environ.get(item.env)
        if text is not None:
            try:
                values[item.name] = item.from_text(text)
            except ValueError as error:
                raise InvalidRequest(f"{item.name} {error}, got {text} from {source}", field=item.name) from None
    if "port" not in values:
        raise InvalidRequest("port must be set: SPOLIA_PORT, as for the node, or --port", field="port")
    return ProbeSettings(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As for every other wrong setting: container engines reserve argparse's own exit code."""
        raise InvalidRequest(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m spolia_node.probe",
        description="Asks a node on this machine for its health. Ends with 0 when it is SERVING, else with 1.",
        allow_abbrev=False,
    )
    for item in settings_of(ProbeSettings):
        source = f"{item.env}, " if item.name in _OF_THE_NODE else ""
        text = f"{item.help} [{source}default {item.shown(item.default)}]"
        if item.kind is bool:
            parser.add_argument(item.flag, action="store_const", const="true", help=text)
        else:
            parser.add_argument(item.flag, metavar=item.name.upper(), help=text)
    return parser


def _connectable(host: str) -> str:
    try:
        found = ip_address(host)
    except ValueError:
        return host
    if not found.is_unspecified:
        return host
    return "127.0.0.1" if found.version == 4 else "::1"
