"""One entry for every file: what it holds decides how it is read."""

from __future__ import annotations

from pathlib import Path

from spolia_fidelity.case_set import CaseSet
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.inputs.draft import get
from spolia_fidelity.inputs.naming import SourceName, source_names
from spolia_fidelity.inputs.options import InputOptions
from spolia_fidelity.inputs.qa_files import is_qa, qa_cases, qa_drafts
from spolia_fidelity.inputs.reading import read_source
from spolia_fidelity.inputs.text_file import text_cases


def load_cases(
    path: str | Path, encoder: TextEncoder, options: InputOptions, named: SourceName | None = None
) -> CaseSet:
    """Cases of a text or QA file, packed by gzip or not. Source, tasks and cases are called as `named` says, which
    `source_names` tells for several files together; None: after the file, as if it were the only one.

    Records with a QA layout's fields are read as that; records with `text`, and every file that is not JSON, as text.
    Raises `NotFound` or `InvalidRequest` (file, place, fields seen) for what cannot be read.
    """
    path = Path(path)
    (alone,) = source_names([path])
    name, task = (named or alone).name, (named or alone).task
    source = read_source(path)
    if isinstance(source, str):
        return text_cases(name, task, [source], encoder, options)
    if "text" in source[0] and not is_qa(source[0]):
        texts = [get(record, "text", str, f"{path.name}, record {index}") for index, record in enumerate(source)]
        return text_cases(name, task, texts, encoder, options)
    return qa_cases(name, qa_drafts(task, source, options), encoder, options)
