"""A file's text or records, whatever it is packed in."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spolia_core.errors import InvalidRequest, NotFound

Record = Mapping[str, Any]


def read_source(path: Path) -> str | list[Record]:
    """Plain text, or the records of a JSON list (`.json`) or of JSON lines (`.jsonl`); each may be gzipped (`.gz`).

    A byte-order mark is passed over. Raises `NotFound` for a file that is not there, `InvalidRequest` for one that is
    empty, not UTF-8, damaged, or not what its name says, with the line.
    """
    text = _read_text(path)
    if not text.strip():
        raise InvalidRequest(f"{path.name} is empty", field="input", limit="≥ 1 character", actual="0")
    match kind_of(path):
        case "jsonl":
            # Not splitlines(): JSON texts may hold U+2028, U+2029 and U+0085 as they are.
            lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
            return [_record(path, _parse(path, line, number), f"line {number}") for number, line in lines]
        case "json":
            found = _parse(path, text, 1)
            if not isinstance(found, list) or not found:
                raise InvalidRequest(
                    f"{path.name} is not a list of records",
                    field="input",
                    limit="a JSON list",
                    actual=type(found).__name__,
                )
            return [_record(path, item, f"record {index}") for index, item in enumerate(found)]
        case _:
            return text


def kind_of(path: Path) -> str:
    """The name's ending without packing: "jsonl", "json", "txt", …, or nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1][1:] if suffixes else ""


def stem_of(path: Path) -> str:
    """The name without the endings `read_source` knows: what tasks and cases are named after."""
    name = path.name
    for ending in (".gz", f".{kind_of(path)}"):
        if len(name) > len(ending) > 1 and name.lower().endswith(ending):
            name = name[: -len(ending)]
    return name


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{path.name} is not UTF-8 at byte {error.start}", field="input", limit="UTF-8 text"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidRequest(f"{path.name} is not a whole gzip file: {error}", field="input", limit="gzip") from error
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}", field="input", actual=str(path)) from error


def _parse(path: Path, text: str, line: int) -> Any:
    where = f"{path.name}, line {line}"
    try:
        found = json.loads(text)
        if "\\ud" in text.lower():  # half of a pair that spells one character is no text
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where}: half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, is no character",
            field="input",
            limit="characters",
        ) from error
    except RecursionError as error:
        raise InvalidRequest(f"{where}: nested too deep to read", field="input", limit="JSON records") from error
    except ValueError as error:
        raise InvalidRequest(f"{where}: not JSON: {error}", field="input", limit="JSON") from error
    return found


def _record(path: Path, item: Any, where: str) -> Record:
    if not isinstance(item, dict):
        raise InvalidRequest(
            f"{path.name}, {where}: not an object", field="input", limit="a JSON object", actual=type(item).__name__
        )
    return item
