"""The probe of a container: `python -m spolia_node.probe [--service NAME] [--alive]`.

Asks a node on this machine for its health, as the node itself: under TLS it shows the node's certificate, for which a
kubelet has none. Ends with 0 or 1, and one line that says why. It runs every few seconds beside the node, so it loads
little.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia_core.errors import InvalidRequest
from spolia_node.probe_identity import ProbeIdentity, identity_of
from spolia_node.probe_settings import ProbeSettings, read_settings

if TYPE_CHECKING:
    import grpc

CHECK = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found: whether all is well, in the sense that was asked for, and the line that says why."""

    ok: bool
    line: str


def probe(settings: ProbeSettings) -> Finding:
    """Asks once, within `timeout_s`. Raises `InvalidRequest` for certificates that cannot be used."""
    import grpc  # after main has silenced what gRPC's core writes of its own
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

    with _channel(settings, identity_of(settings)) as channel:
        check: grpc.UnaryUnaryMultiCallable[HealthCheckRequest, HealthCheckResponse] = channel.unary_unary(
            CHECK,
            request_serializer=HealthCheckRequest.SerializeToString,
            response_deserializer=HealthCheckResponse.FromString,
        )
        asked = f"{settings.service or 'all services'} at {settings.address}"
        try:
            status = check(HealthCheckRequest(service=settings.service), timeout=settings.timeout_s).status
        except grpc.RpcError as error:
            return Finding(False, f"{error.code().name} {asked}: {error.details()}")
    said = HealthCheckResponse.ServingStatus.Name(status)
    return Finding(status == HealthCheckResponse.SERVING or settings.alive, f"{said} {asked}")


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """The exit code: 0 for SERVING, or any health with `--alive`; 1 for everything else, wrong settings included."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        finding = probe(read_settings(sys.argv[1:] if argv is None else argv, environ))
    except InvalidRequest as error:
        finding = Finding(False, f"probe: {error.message}")
    print(" ".join(finding.line.split()))
    return 0 if finding.ok else 1


def _channel(settings: ProbeSettings, identity: ProbeIdentity | None) -> grpc.Channel:
    import grpc

    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if identity is None:
        return grpc.insecure_channel(settings.address, options=options)
    credentials = grpc.ssl_channel_credentials(identity.believed_pem, identity.key_pem, identity.chain_pem)
    options.append(("grpc.ssl_target_name_override", identity.expected_name))
    return grpc.secure_channel(settings.address, credentials, options=options)


if __name__ == "__main__":
    sys.exit(main())
