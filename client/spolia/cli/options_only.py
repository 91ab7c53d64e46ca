"""Commands that have options only, and what somebody writes behind one."""

from __future__ import annotations

import typer
from typer.core import TyperCommand

from spolia.errors import InvalidRequest


class OptionsOnly(TyperCommand):
    """Refuses arguments, and says how one that looks like an address is given: Typer would only say that it is one too
    many.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # Typer's subclass
        """As Typer does. Raises `InvalidRequest` for an argument."""
        ctx.allow_extra_args = True
        strays = super().parse_args(ctx, args)
        if strays:
            raise _refusal(ctx.command_path, strays[0])
        return strays


def _refusal(command: str, stray: str) -> InvalidRequest:
    is_address = stray.rpartition(":")[2].isdecimal()
    remedy = f"; the gateway's address is an option: {command} -a {stray}" if is_address else ""
    return InvalidRequest(
        f"{command} takes options only, not {stray!r}{remedy}", field="arguments", limit="none", actual=stray
    )
