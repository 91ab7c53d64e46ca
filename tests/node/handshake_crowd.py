"""A program: a server under TLS, and a crowd that connects to it at once, over and over, while its certificate changes.

python handshake_crowd.py FOLDER ROUNDS    (certificates of two authorities in FOLDER/one and FOLDER/other)
"""

from __future__ import annotations

import asyncio
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from spolia_node.certificates import Credentials, NodeCertificates
from spolia_node.tls import server_credentials

NUM_THREADS = 4
NUM_AT_ONCE = 8
CHANGES_EVERY = 2000


class Changing:
    """Shows one certificate and then the other."""

    def __init__(self, folder: Path) -> None:
        self._shown = [NodeCertificates(folder / name, "kvstore").current() for name in ("one", "other")]
        self.num_handshakes = 0

    def began(self) -> None:
        self.num_handshakes += 1

    def current(self) -> Credentials:
        return self._shown[self.num_handshakes // CHANGES_EVERY % 2]


async def main(folder: Path, num_rounds: int) -> int:
    certificates = Changing(folder)
    credentials = server_credentials(
        certificates,  # type: ignore[arg-type]  # has what is asked of one
        with_client_certificate=True,
        on_handshake=certificates.began,
    )
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()

    def come_and_go(_: int) -> None:
        for one in [socket.create_connection(("127.0.0.1", port), 30) for _ in range(NUM_AT_ONCE)]:
            one.close()

    def crowd() -> None:
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(come_and_go, range(num_rounds)))

    await asyncio.to_thread(crowd)
    await server.stop(0)
    return certificates.num_handshakes


if __name__ == "__main__":
    print(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]))))
