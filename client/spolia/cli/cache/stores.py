"""Which stores a command speaks to, and what it says of those that did not answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer

from spolia.cli.output import exit_code, print_error
from spolia.errors import SpoliaError
from spolia.store_admin import StoreAdmin


def open_stores(stores: Sequence[str] | None, address: str, timeout_s: float) -> StoreAdmin:
    """The stores that were named; where none was, those the gateway at `address` knows."""
    if stores:
        return StoreAdmin(stores, timeout_s=timeout_s)
    return StoreAdmin.of_cluster(address, timeout_s=timeout_s)


def failures(failed: Mapping[str, SpoliaError]) -> list[dict[str, str]]:
    """Stores that did not answer, as JSON has them."""
    return [
        {"store": store, "error": type(error).__name__, "message": error.message} for store, error in failed.items()
    ]


def finish(failed: Mapping[str, SpoliaError], *, code: int = 0) -> None:
    """Names the stores that did not answer, after the others' results.

    Ends the command with `code`; where that is 0, with the exit code of the first failure, if there is one.
    """
    for error in failed.values():
        print_error(error)
    first = next((exit_code(error) for error in failed.values()), 0)
    if code or first:
        raise typer.Exit(code or first)
