"""What pages of elsewhere get, which a browser of this machine lets ask: nothing, and why."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import Response

from spolia_gateway.http.errors import plain_error
from spolia_gateway.identities import Identities, Refusal
from spolia_gateway.own_names import OwnNames

_SETTING = "http_allowed_hosts (--http-allowed-hosts, SPOLIA_HTTP_ALLOWED_HOSTS)"
_WHOM = "without keys it serves localhost, loopback addresses and the names in"


class PagesElsewhere:
    """Refuses requests that name another host than this machine, or come from a page of one."""

    def __init__(self, names: OwnNames | None, identities: Identities) -> None:
        """`names` are this machine's; None lets everybody in, for `identities` to judge."""
        self._names = names
        self._identities = identities

    def refusal(self, headers: Headers) -> Response | None:
        """The answer for who is refused; None for who is not."""
        stranger = None if self._names is None else self._names.stranger(headers.get("host"), headers.get("origin"))
        if stranger is None:
            return None
        told = ascii(stranger.value)
        if stranger.header == "host":
            message = f"this server does not answer as host {told}: {_WHOM} {_SETTING}; add it there if it is yours"
            self._identities.note(Refusal.HOST, message)
            return plain_error(421, message, "host_not_served")
        message = f"pages of {told} may not call this server: {_WHOM} {_SETTING}; add their host if you trust them"
        self._identities.note(Refusal.ORIGIN, message)
        return plain_error(403, message, "origin_not_allowed")
