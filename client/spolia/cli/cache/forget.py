"""`spolia cache forget`: drop documents, by their text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    Json,
    Model,
    Retry,
    SplitMaxTokens,
    SplitterOption,
    Timeout,
    name_of,
)
from spolia.cli.output import plain_record, print_columns, print_json
from spolia.cli.texts import read_documents
from spolia.cli.units import human_bytes
from spolia.client import Client

COLUMNS = ("documents", "dropped from stores", "size", "copies", "dropped from nodes")


def forget(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders of files.", metavar="FILE")],
    pattern: Annotated[str, typer.Option("--glob", help="Which files of a folder.")] = "*",
    splitter: SplitterOption = None,
    split_max_tokens: SplitMaxTokens = None,
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    retry: Retry = 5.0,
    as_json: Json = False,
) -> None:
    """Drop the KV of documents from every tier, store and node, through the gateway.

    Name the splitter with which they were stored. What was computed in prompts around them stays until it ages out:
    prefix chunks (EXACT) and linked chunks (LINKED), whose ids nobody can name without the whole prompt. An operator
    sees what of a tenant is in stores with cache ls --tenant, and drops it with cache rm.
    """
    documents = read_documents(paths, pattern)
    with Client(address, timeout_s=timeout, retry_s=retry, model=model) as client:
        forgotten = client.forget(documents, splitter=name_of(splitter), split_max_tokens=split_max_tokens)
    if as_json:
        report = plain_record(forgotten)
        print_json({"num_documents": len(documents), **report})
        return
    tiers = ", ".join(f"{dropped.tier} {dropped.num_objects}" for dropped in forgotten.stored_tiers)
    stored = (str(forgotten.num_stored_dropped), human_bytes(forgotten.stored_bytes_dropped), tiers)
    print_columns(COLUMNS, (str(len(documents)), *stored, str(forgotten.num_resident_dropped)))
