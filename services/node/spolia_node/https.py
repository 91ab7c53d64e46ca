"""TLS for what serves HTTP beside gRPC, with the same files and the same rotation."""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

from spolia_node.certificates import Certificates, Credentials


def https_context(certificates: Certificates) -> ssl.SSLContext:
    """A server's context that shows the newest certificate in every handshake, and asks callers for none."""
    last = certificates.current()
    newest = _context_of(last)
    context = _context_of(last)

    def show_newest(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal last, newest
        current = certificates.current()
        if current != last:
            last, newest = current, _context_of(current)
        connection.context = newest

    context.sni_callback = show_newest  # called for callers that name no host, too
    return context


def _context_of(mine: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # Python reads these from files only; the bytes were checked, and the files may have changed since.
    with tempfile.TemporaryDirectory(prefix="spolia-tls-") as folder:
        chain, key = Path(folder, "chain"), Path(folder, "key")
        chain.write_bytes(mine.chain_pem)
        key.touch(mode=0o600)
        key.write_bytes(mine.key_pem)
        context.load_cert_chain(chain, key)
    return context
