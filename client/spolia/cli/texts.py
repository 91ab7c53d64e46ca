"""Documents from files."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator, Sequence
from pathlib import Path

from spolia.cli.output import notes
from spolia.errors import InvalidRequest
from spolia.parts import Document

EVERYTHING = "*"
"""Takes whatever is text; who asks for names of a kind gets files of that kind."""
PICTURE = "image"
"""The main type of what is not read, though some pictures are written in text; what else is no text shows it."""
_KNOWN = mimetypes.MimeTypes()
"""Names of files as Python knows them: a folder shall be the same texts on every machine, whatever that has in /etc."""


class NoText(InvalidRequest):
    """A file that nothing said to be text, and that is none."""


def read_document(path: Path) -> str:
    """The text of a file; `InvalidRequest`, naming it, when it cannot be read as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", field=str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8 text", field=str(path), limit="UTF-8") from error


def read_found(path: Path, pattern: str) -> str:
    """The same of a file that was found in a folder by `pattern`; `NoText` for what is there beside texts."""
    kind = _KNOWN.guess_type(path.name)[0] or ""
    main = kind.partition("/")[0]
    if pattern == EVERYTHING and main == PICTURE:
        raise NoText(f"{path} is {kind}, no text", field=str(path), limit="text", actual=kind)
    try:
        return read_document(path)
    except InvalidRequest as error:
        if error.limit != "UTF-8" or main == "text":  # one that is called text, and cannot be read, is broken
            raise
        raise NoText(error.message, field=error.field, limit=error.limit) from error


def read_documents(paths: Sequence[Path], pattern: str) -> list[Document]:
    """The texts of `files_of` the paths, named after their files. Says which files are left out, empty or no text.

    Raises `InvalidRequest` when a file cannot be read, or when all are empty.
    """
    texts = list(_texts(paths, pattern))
    empty = [str(path) for path, text in texts if not text]
    if empty:
        notes().print(f"left out, because empty: {', '.join(empty)}", markup=False)
    if len(empty) == len(texts):
        raise InvalidRequest("every file is empty, or no text", field="documents", limit="≥ 1 character")
    return [Document(text, name=str(path)) for path, text in texts if text]


def _texts(paths: Sequence[Path], pattern: str) -> Iterator[tuple[Path, str]]:
    named = {path for path in paths if not path.is_dir()}
    for path in files_of(paths, pattern):
        try:
            yield path, read_document(path) if path in named else read_found(path, pattern)
        except NoText as error:
            notes().print(f"left out: {error.message}", markup=False)


def files_of(paths: Sequence[Path], pattern: str) -> Iterator[Path]:
    """Files as they were named; of a folder, those below it whose names match `pattern`, sorted, hidden ones left out.

    Raises `InvalidRequest` for a path that does not exist, and for a folder without such a file.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        below = sorted(file for file in path.rglob(pattern) if file.is_file() and not _is_hidden(file, path))
        if not below:
            raise InvalidRequest(f"{path} holds no file that matches {pattern}", field=str(path), limit=pattern)
        yield from below


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(name.startswith(".") for name in file.relative_to(folder).parts)
