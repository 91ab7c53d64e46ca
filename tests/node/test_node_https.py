"""TLS for HTTP: the newest certificate in every handshake."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from tls_worlds import DAY, authority_in

from spolia.local_authority import renew_certificates
from spolia_node.certificates import LOOK_EVERY_S, NodeCertificates
from spolia_node.https import https_context


async def test_a_rotation_shows_in_the_next_handshake_and_cuts_no_connection(tmp_path: Path) -> None:
    folder, now = authority_in(tmp_path / "certs"), [0.0]
    context = https_context(NodeCertificates(folder, "gateway", lambda: now[0]))

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    believed = ssl.create_default_context(cafile=str(folder / "ca.crt"))

    async def connected(name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=believed, server_hostname=name)
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return reader, writer, shown

    try:
        reader, writer, before = await connected("localhost")
        renew_certificates(folder, DAY, roles=["gateway"])
        now[0] += LOOK_EVERY_S
        for name in ("localhost", "127.0.0.1"):  # an address is no name to ask for
            _, other, after = await connected(name)
            assert after != before
            other.close()
        writer.write(b"still here\n")
        assert await asyncio.wait_for(reader.readline(), 10) == b"still here\n"
        writer.close()
    finally:
        server.close()
        await server.wait_closed()
