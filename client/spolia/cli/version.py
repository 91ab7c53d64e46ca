"""`spolia version`: what is installed."""

from __future__ import annotations

import platform

from spolia.cli.options import Json
from spolia.cli.output import print_json
from spolia.version import UNINSTALLED_VERSION, __version__, installed_version

PARTS = ("grpcio", "protobuf", "torch", "transformers", "tokenizers", "triton")
"""Distributions on which answers may depend. Looked up, never imported."""


def version(as_json: Json = False) -> None:
    """Say which release this is and what it runs on."""
    found = {name: installed_version(name) for name in PARTS}
    versions = {"spolia": __version__, "python": platform.python_version()}
    versions |= {name: number for name, number in found.items() if number != UNINSTALLED_VERSION}
    if as_json:
        print_json(versions)
        return
    for name, number in versions.items():
        print(f"{name} {number}")
