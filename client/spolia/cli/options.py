"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from spolia.connection import DEFAULT_ADDRESS
from spolia.options import SplitterName

Address = Annotated[
    str, typer.Option("--address", "-a", envvar="SPOLIA_ADDRESS", help="Where the gateway is, host:port.")
]
Model = Annotated[str, typer.Option("--model", "-m", help="Model to ask; not needed where the cluster serves one.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Most seconds to wait for the whole command.")]
Retry = Annotated[
    float,
    typer.Option(
        "--retry",
        metavar="SECONDS",
        help="How long to ask again while no gateway or node can take it, and nothing has come; 0 asks once.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]


class SplitterChoice(StrEnum):
    """Splitters as the command line names them."""

    DOCUMENT = "document"
    PARAGRAPH = "paragraph"
    SENTENCE = "sentence"
    FIXED = "fixed"


SplitterOption = Annotated[
    SplitterChoice | None,
    typer.Option(
        "--splitter",
        help="Where documents are cut into chunks: nowhere, behind paragraphs, behind sentences packed up to a limit, "
        "or every so many tokens. What is warmed, asked about and forgotten must be cut alike. Default: the gateway's.",
    ),
]
SplitMaxTokens = Annotated[
    int | None, typer.Option("--split-max-tokens", help="Most tokens of a chunk; default: the gateway's.")
]

__all__ = [
    "DEFAULT_ADDRESS",
    "Address",
    "Json",
    "Model",
    "Retry",
    "SplitMaxTokens",
    "SplitterChoice",
    "SplitterOption",
    "Timeout",
    "name_of",
]


def name_of(splitter: SplitterChoice | None) -> SplitterName | None:
    """What the client calls it."""
    return None if splitter is None else splitter.value
