"""Stands in for a service: announces itself, is seen by the gateway's stand-in, ends when told to.

`STAND_IN_FOLDER` is shared by all of them: `<address>` files say who is there, `ended` lists roles in the order in
which they ended. Settings make one misbehave.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc

STOP_S = 10.0
SERVERS: list[grpc.Server] = []
"""To be stopped before the process ends: one that is found there by the interpreter's end may hold it up."""


def main(role: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--http-port", type=int, default=-1)
    parser.add_argument("--directory", default="")
    parser.add_argument("--model", default="")
    parser.add_argument("--log-level", default="")
    parser.add_argument("--profile-dir", default="")
    parser.add_argument("--die-with", type=int, help="end with this exit code before being ready")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--hide", action="store_true", help="serve, but stay unknown to the gateway")
    parser.add_argument("--mute", action="store_true", help="never say READY")
    options = parser.parse_args()
    print(f"{role} starts with {sys.argv[1:]}", file=sys.stderr, flush=True)
    if options.die_with is not None:
        print(f"{role} cannot go on", file=sys.stderr, flush=True)
        sys.exit(options.die_with)
    # Its handler interrupts the wait for it: an event's lock, held by the one, would be waited for by the other.
    signals: SimpleQueue[int] = SimpleQueue()

    def on_term(number: int, frame: FrameType | None) -> None:
        if not options.ignore_term:
            signals.put(number)

    signal.signal(signal.SIGTERM, on_term)
    folder = Path(os.environ["STAND_IN_FOLDER"])
    with socket.create_server(("127.0.0.1", 0 if role == "gateway" else options.port)) as server:
        address = _serve_gateway(folder, options.port) if role == "gateway" else _address(server)
        if not options.hide:
            threads = os.environ.get("OMP_NUM_THREADS", "")
            (folder / address).write_text(f"{role} threads={threads} {' '.join(sys.argv[1:])}")
        if not options.mute:
            print("a line that is not for the parent", flush=True)
            also = f" http=127.0.0.1:{options.http_port or 8001}" if options.http_port >= 0 else ""
            also += " metrics=127.0.0.1:9"
            print(f"READY {role} {address}{also}", flush=True)
        _wait(signals)
        for each in SERVERS:
            each.stop(grace=None).wait(STOP_S)
    with (folder / "ended").open("a") as ended:
        ended.write(f"{role}\n")


def _wait(signals: SimpleQueue[int]) -> None:
    """Returns once there is one. A signal that comes just before a wait is seen when that ends."""
    while True:
        with suppress(Empty):
            signals.get(timeout=0.05)
            return


def _address(server: socket.socket) -> str:
    host, port = server.getsockname()
    return f"{host}:{port}"


def _serve_gateway(folder: Path, port: int) -> str:
    import fake_gateway

    from spolia.v1 import directory_pb2, gateway_pb2

    class Gateway(fake_gateway.FakeGateway):
        def GetCluster(self, request: object, context: object) -> gateway_pb2.GetClusterResponse:
            found = [path.name for path in folder.iterdir() if ":" in path.name]
            records = [directory_pb2.NodeRecord(node_id=address, address=address) for address in found]
            return gateway_pb2.GetClusterResponse(nodes=records, directory_reachable=True)

    gateway = Gateway()
    SERVERS.append(fake_gateway.start(gateway, port))
    return gateway.address
