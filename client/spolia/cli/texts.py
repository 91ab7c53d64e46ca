"""Documents from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from spolia.cli.output import notes
from spolia.errors import InvalidRequest
from spolia.parts import Document

EVERYTHING = "*"
"""Takes whatever is text; who asks for names of a kind gets files of that kind."""
# Lists, as what a machine knows of names differs from others': a folder shall be the same texts everywhere.
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".eps", ".xpm", ".xbm", ".pbm", ".pgm", ".ppm")
"""What is not read, though some of it may be written in text."""
TEXTS = (".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".html", ".htm", ".csv", ".tsv")
"""What is called text: one that cannot be read as such is broken, and not left out."""


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
    if pattern == EVERYTHING and path.suffix.lower() in PICTURES:
        raise NoText(f"{path} is a picture", field=str(path), limit="text", actual=path.suffix)
    try:
        return read_document(path)
    except InvalidRequest as error:
        if error.limit != "UTF-8" or path.suffix.lower() in TEXTS:
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
