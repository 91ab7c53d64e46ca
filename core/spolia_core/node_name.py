"""How a certificate names a node: by its role, in a URI and in a DNS name.

Nodes are found by address in the directory, and addresses come and go, so a certificate does not name them: whoever
calls a node expects the DNS name of the role it wants, and whoever is called reads the URI.
"""

from __future__ import annotations

from collections.abc import Iterable

OPERATOR = "operator"
"""Role of a person's or a job's certificate, for the commands that talk to stores."""

NODE_ROLES = ("gateway", "prefill", "decode", "kvstore")
CERTIFIED_ROLES = (*NODE_ROLES, OPERATOR)
AUTHORITY_FILE = "ca.crt"
"""Name, in a folder of certificates, of those that may vouch for the others."""

_PREFIX = "spolia://node/"


def node_uri(role: str) -> str:
    """The URI that a certificate of `role` has among its alternative names."""
    return _PREFIX + role


def node_dns_name(role: str) -> str:
    """What a certificate of `role` has among its DNS names. It is never looked up."""
    return f"{role}.node.spolia.internal"


def role_in(uris: Iterable[str]) -> str:
    """The role that a certificate's URIs say; empty where they say none, an unknown one, or several."""
    roles = {uri.removeprefix(_PREFIX) for uri in uris if uri.startswith(_PREFIX)}
    role = roles.pop() if len(roles) == 1 else ""
    return role if role in CERTIFIED_ROLES else ""
