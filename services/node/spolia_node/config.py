"""Where a node's settings come from: flag, then environment, then file, then default. Bad values stop the start."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from spolia_core.errors import InvalidRequest
from spolia_node.addresses import addresses_in, is_address
from spolia_node.logs import LOG_LEVELS
from spolia_node.own_address import address_towards
from spolia_node.settings import Setting, at_least, between, one_of, setting, settings_of

__all__ = ["NodeConfig", "at_least", "between", "load_config", "one_of", "role_of", "setting"]

DEFAULT_SECRET = "spolia-development"
AUTO = "auto"
ROLES = ("gateway", "prefill", "decode", "kvstore")
FILE_ENV = "SPOLIA_CONFIG"
MIN_MESSAGE_BYTES = 5 << 20
"""A frame of 4 MiB and what surrounds it must fit into a message."""


@dataclass(frozen=True)  # no slots: a subclass that has them could not call super() before Python 3.14
class NodeConfig:
    """Settings every node has. A subclass adds its own with `setting`, and `check_together` for those that interact.

    Values are checked however the object is made; `InvalidRequest` names the first bad setting.
    """

    role: ClassVar[str] = ""
    """Names the table of the file that is this node's; empty: taken from the class name, DecodeConfig → decode."""

    host: str = setting("127.0.0.1", "Address to listen on; 0.0.0.0 to be reached from other machines.")
    port: int = setting(0, "Port to listen on; 0 takes a free one.", check=between(0, 65535))
    advertise_host: str = setting(
        "",
        "Host name or address peers reach this node by; empty: same as host. auto: the address from which this machine "
        "reaches the directory; for containers, which are given theirs.",
    )
    node_id: str = setting("", "Unique name of this node in the cluster; empty: made from its role and a random part.")
    directory: str = setting(
        "",
        'Address "host:port" of the kvstore process that keeps the directory; empty: none. Several, "a:1,b:2", are '
        "tried in turn.",
    )
    cluster_secret: str = setting(
        DEFAULT_SECRET,
        "Secret all nodes share, from which tenants' keys are made; must be changed when host is not loopback.",
        check=lambda value: None if value else "not empty",
        secret=True,
    )
    tls_dir: Path | None = setting(
        None,
        "Folder with the certificate of this node (ROLE.crt and ROLE.key, or tls.crt and tls.key) and of the authority "
        "that nodes believe (ca.crt); files replaced there are taken over. Needed when host is not loopback.",
    )
    allow_plaintext: bool = setting(
        False, "Serve outside loopback without TLS: whoever reaches the network reads and changes everything."
    )
    log_level: str = setting(
        "info", f"Least severe log lines to write: {', '.join(LOG_LEVELS)}.", check=one_of(*LOG_LEVELS)
    )
    log_json: bool = setting(False, "Write log lines as JSON, for collectors.")
    drain_timeout_s: float = setting(
        10.0,
        "Seconds that a node has to end when it is asked to: calls under way get them to finish. Give it as long as "
        "your longest answer takes, and the platform 5 s more.",
        check=between(0.0, 3600.0),
    )
    drain_delay_s: float = setting(
        0.5,
        "Seconds of those in which new calls are still taken, until the others have heard that it ends; more where "
        "they learn it by probes, of a balancer or of Kubernetes.",
        check=between(0.0, 3600.0),
    )
    max_message_bytes: int = setting(
        16 << 20, "Largest gRPC message, in bytes, sent or accepted.", check=between(MIN_MESSAGE_BYTES, 2**31 - 1)
    )
    metrics_port: int = setting(
        0, "Port of the Prometheus endpoint; 0 takes a free one, -1 turns it off.", check=between(-1, 65535)
    )
    metrics_host: str = setting(
        "",
        "Address that endpoint listens on; empty: same as host. It asks nobody who they are, and names tenants: keep "
        "it to networks you trust.",
    )
    tracing_endpoint: str = setting(
        "",
        "Where spans of requests go: the OTLP gRPC endpoint of a collector, http://host:4317 or https://…; empty: "
        "nothing is traced. Needs the extra tracing.",
        check=lambda value: None if not value or value.startswith(("http://", "https://")) else "http://… or https://…",
    )
    tracing_share: float = setting(
        1.0,
        "Share of the requests that are traced, of those whose client has not decided it.",
        check=between(0.0, 1.0),
    )
    rpc_timeout_s: float = setting(
        30.0, "Seconds a call to another node may take where the caller set no deadline.", check=between(0.001, 86400.0)
    )

    def __post_init__(self) -> None:
        for known in settings_of(type(self)):
            problem = known.problem(getattr(self, known.name))
            if problem:
                raise _invalid(known.name, f"{known.name} {problem}", known.shown(getattr(self, known.name)))
        _check_reachability(self)
        problem = self.check_together()
        if problem:
            raise InvalidRequest(problem)
        self._fill("node_id", self.node_id or f"{role_of(type(self))}-{secrets.token_hex(4)}")
        self._fill("advertise_host", self._advertised_host())

    def check_together(self) -> str | None:
        """What is wrong with settings that are each good alone, by name. None when nothing is."""
        return None

    @property
    def max_client_files(self) -> int:
        """Most connections that the settings let clients have open at once, each a file; 0: none of them says."""
        return 0

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return _is_loopback(self.host)

    def _advertised_host(self) -> str:
        if self.advertise_host == AUTO:
            return address_towards(addresses_in(self.directory))
        return self.advertise_host or self.host

    def _fill(self, name: str, value: str) -> None:
        object.__setattr__(self, name, value)  # the one moment at which a frozen object may still be completed


C = TypeVar("C", bound=NodeConfig)


def role_of(cls: type[NodeConfig]) -> str:
    """The role whose settings a class holds."""
    return cls.role or cls.__name__.removesuffix("Config").lower()


def load_config(
    cls: type[C], argv: Sequence[str], environ: Mapping[str, str] = os.environ, file: Path | None = None
) -> C:
    """The configuration of this process. `argv` is without the program's name.

    Flag over environment over file over default. The file is that of `--config`, else of SPOLIA_CONFIG, else `file`;
    in it a table named for the role wins over the top level. Prints and exits the process with 0 for `--help`, with 2
    when anything is wrong: every bad setting is named, with its source and its limit.
    """
    known = settings_of(cls)
    parser = _parser(cls, known)
    flags = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    problems: list[str] = []
    path = flags.pop("config") or environ.get(FILE_ENV) or file
    if path:
        _read_file(Path(path), role_of(cls), known, values, problems)
    for item in known:
        _take_text(item, environ.get(item.env), item.env, values, problems)
        _take_text(item, flags[item.name], item.flag, values, problems)
    if not problems:
        try:
            return cls(**values)
        except InvalidRequest as error:
            problems.append(error.message)
    for problem in problems:
        print(f"{parser.prog}: {problem}", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Tells the problem as `load_config` tells the others."""
        self.exit(2, f"{self.prog}: {message}; spolia serve {self.prog} --help lists the settings\n")


def _parser(cls: type[NodeConfig], known: Sequence[Setting]) -> argparse.ArgumentParser:
    role = role_of(cls)
    parser = _Parser(
        prog=role,
        usage=f"spolia serve {role} [--SETTING VALUE]...\n   or: python -m spolia_{role} [--SETTING VALUE]...",
        description="Settings. A flag wins over the environment, that over the file, and that over the default.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="PATH", help=f"TOML file with settings [{FILE_ENV}]")
    for item in known:
        text = f"{item.help} [{item.env}, default {item.shown(item.default)}]".replace("%", "%%")
        if item.kind is bool:
            parser.add_argument(item.flag, dest=item.name, nargs="?", const="true", metavar="true|false", help=text)
        else:
            parser.add_argument(item.flag, dest=item.name, metavar=item.name.upper(), help=text)
    return parser


def _take_text(item: Setting, text: str | None, source: str, values: dict[str, Any], problems: list[str]) -> None:
    if text is None:
        return
    try:
        values[item.name] = item.from_text(text)
    except ValueError as error:
        problems.append(f"{item.name} {error}, got {item.shown(text)} from {source}")


def _read_file(path: Path, role: str, known: Sequence[Setting], values: dict[str, Any], problems: list[str]) -> None:
    try:
        with path.open("rb") as opened:
            content = tomllib.load(opened)
    except (OSError, tomllib.TOMLDecodeError) as error:
        problems.append(f"the file {path} cannot be read: {error}")
        return
    tables = {name: content.pop(name) for name in {*ROLES, role} if isinstance(content.get(name), dict)}
    _take_table(content, f"{path}", known, values, problems)
    _take_table(tables.get(role, {}), f"[{role}] of {path}", known, values, problems)


def _take_table(
    table: Mapping[str, object], source: str, known: Sequence[Setting], values: dict[str, Any], problems: list[str]
) -> None:
    by_name = {item.name: item for item in known}
    for name, value in table.items():
        item = by_name.get(name)
        if item is None:
            problems.append(f"{name} in {source} is no setting of this node; --help lists them")
            continue
        try:
            values[name] = item.from_toml(value)
        except ValueError as error:
            problems.append(f"{name} {error}, got {item.shown(value)} from {source}")


def _check_reachability(config: NodeConfig) -> None:
    if not config.is_local and config.cluster_secret == DEFAULT_SECRET:
        raise _invalid(
            "cluster_secret",
            f"cluster_secret must be changed when host is not loopback; host is {config.host}",
            "(the default)",
        )
    if not config.is_local and config.tls_dir is None and not config.allow_plaintext:
        raise _invalid(
            "tls_dir",
            f"tls_dir must be set when host is not loopback; host is {config.host} (spolia certs init makes one for "
            "development; allow_plaintext goes without)",
            "none",
        )
    if not config.advertise_host and _is_wildcard(config.host):
        raise _invalid(
            "advertise_host", f"advertise_host must say how peers reach this node, or auto; host is {config.host}", ""
        )
    if not all(is_address(address) for address in addresses_in(config.directory)):
        raise _invalid(
            "directory",
            f'directory must be "host:port", or several with commas, got {config.directory}',
            config.directory,
        )


def _invalid(name: str, message: str, actual: str) -> InvalidRequest:
    return InvalidRequest(message, field=name, actual=actual)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_wildcard(host: str) -> bool:
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False
