"""How an operator's tools reach stores themselves: by the certificate of the role `operator`."""

from __future__ import annotations

import os
from pathlib import Path

import grpc

from spolia.connection import TLS_DIR_ENV, allows_plaintext, channel_options, check_address
from spolia_core.errors import InvalidRequest
from spolia_core.node_name import AUTHORITY_FILE, OPERATOR, node_dns_name


def store_channel(address: str, tls_dir: str | os.PathLike[str] | None = None) -> grpc.Channel:
    """A channel to a store, not connected yet; under TLS where there is a folder of certificates.

    The folder, SPOLIA_TLS_DIR by default, has `operator.crt` and `operator.key`, else `tls.crt` and `tls.key`, and
    `ca.crt`.
    Raises `InvalidRequest` for one that cannot be read, and for none where plaintext is not allowed.
    """
    options: list[tuple[str, int | str]] = [*channel_options(check_address(address))]
    named = tls_folder(tls_dir)
    if named:
        options.append(("grpc.ssl_target_name_override", node_dns_name("kvstore")))
        return grpc.secure_channel(address, _credentials(Path(named)), options=options)
    if not allows_plaintext(address):
        raise InvalidRequest(
            f"{address} is on another machine: tls_dir must name a folder with an operator's certificate",
            field="tls_dir",
        )
    return grpc.insecure_channel(address, options=options)


def tls_folder(tls_dir: str | os.PathLike[str] | None) -> str:
    """The folder of certificates that is meant, by the environment where none is given; empty: none."""
    return os.environ.get(TLS_DIR_ENV, "") if tls_dir is None else os.fspath(tls_dir)


def _credentials(folder: Path) -> grpc.ChannelCredentials:
    stem = OPERATOR if (folder / f"{OPERATOR}.crt").exists() else "tls"
    files = (folder / AUTHORITY_FILE, folder / f"{stem}.key", folder / f"{stem}.crt")
    try:
        return grpc.ssl_channel_credentials(*(path.read_bytes() for path in files))
    except OSError as error:
        raise InvalidRequest(
            f"tls_dir: {error.filename} cannot be read: {error.strerror}", field="tls_dir", actual=str(folder)
        ) from error
