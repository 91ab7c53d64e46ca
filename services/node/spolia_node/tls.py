"""gRPC's credentials, made of ours."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from spolia_node.certificates import Certificates, Credentials


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
    configuration = _configuration(last)

    def fetch() -> grpc.ServerCertificateConfiguration:
        nonlocal last, configuration
        on_handshake()
        current = certificates.current()
        if current != last:
            last, configuration = current, _configuration(current)
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        configuration, fetch, require_client_authentication=with_client_certificate
    )


def _configuration(mine: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(mine.key_pem, mine.chain_pem)], root_certificates=mine.authority_pem
    )
