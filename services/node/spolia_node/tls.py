"""gRPC's credentials, made of ours."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc

from spolia_node.certificates import Certificates, Credentials

SETTLE_S = 0.1
"""How long handshakes that have begun are given to read the certificate that is about to be replaced."""


def channel_credentials(mine: Credentials) -> grpc.ChannelCredentials:
    """For calls as this node, to peers of its authority."""
    return grpc.ssl_channel_credentials(mine.authority_pem, mine.key_pem, mine.chain_pem)


def server_credentials(
    certificates: Certificates, *, with_client_certificate: bool, on_handshake: Callable[[], None] = lambda: None
) -> grpc.ServerCredentials:
    """For a server that shows its newest certificate in every handshake, and may ask for the caller's.

    `on_handshake` is called as each begins, from gRPC's threads.
    """
    last = certificates.current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """None where nothing changed.

        With every configuration it is given, equal or not, gRPC frees what it made of the one before, though a
        handshake in another of its threads may be about to read that (grpc/grpc#36693). No two threads are in here at
        once, and no handshake passes one that is: those that did before have read it by the end of the wait.
        """
        nonlocal last
        on_handshake()
        current = certificates.current()
        if current == last:
            return None
        time.sleep(SETTLE_S)
        last = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(last),
        fetch,  # type: ignore[arg-type]  # None is "no change", of which the stubs do not know
        require_client_authentication=with_client_certificate,
    )


def _configuration(mine: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(mine.key_pem, mine.chain_pem)], root_certificates=mine.authority_pem
    )
