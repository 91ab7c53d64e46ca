"""How a generation is asked for, apart from its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, TypedDict

from spolia_core.reuse import ReuseMode
from spolia_core.splitting import Splitter

Mode: TypeAlias = Literal["exact", "linked"] | ReuseMode
"""How much an answer may give up for speed: nothing, or a little by reusing documents wherever they stand."""

SplitterName: TypeAlias = Literal["document", "paragraph", "sentence", "fixed"] | Splitter
"""Where documents are cut into the chunks that are stored and reused: nowhere, behind paragraphs, behind sentences
packed up to a limit, or every so many tokens."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream`, `chat` and `stream_chat`; all of them optional.

    >>> careful: GenerateOptions = {"temperature": 0.2, "max_tokens": 64}
    >>> client.generate("Why is the sky blue?", **careful)
    """

    mode: Mode
    """`"exact"` (default): the answer equals full recompute. `"linked"`: documents are reused at any position;
    approximate."""
    splitter: SplitterName | None
    """Where documents are cut into chunks; None (default): as the gateway is set. Changes nothing for `"exact"`."""
    split_max_tokens: int | None
    """Most tokens of such a chunk, 32 … 65536; None (default): as the gateway is set. No limit for `"document"`."""
    max_tokens: int | None
    """Most tokens to produce, ≥ 1. None (default): 256, or what the context leaves if that is less."""
    temperature: float
    """Softmax temperature, 0 … 100; 0 (default) takes the likeliest token."""
    top_p: float
    """Draw from the smallest set of tokens whose probability reaches this, in (0, 1]; 1 (default) keeps all."""
    top_k: int
    """Draw from this many likeliest tokens; 0 (default) keeps all."""
    seed: int | None
    """Seed of the draws, 0 … 2^64 - 1. The same seed gives the same answer. None (default): the gateway draws one and
    `Result.seed` says which."""
    stop: str | Sequence[str]
    """Generation ends before the first of these appears in the text. At most 16 strings of 1 … 256 bytes."""
    n: int
    """Answers to draw, 1 … 64; 1 (default). The prompt's KV is held once for all; `Result.samples` has them."""
    logprobs: int | None
    """How likely each token was, and this many of the likeliest in its place, 0 … 20; None (default): not told."""
    json_schema: str | Mapping[str, object] | None
    """Schema of the JSON value that every answer is, as a mapping or as text; None (default): any text. At most one of
    `json_schema`, `json_object`, `regex`, `choices` and `lark`; docs/structured.md says what each can ask for."""
    json_object: bool
    """Every answer is a JSON object."""
    regex: str | None
    """Regular expression that every answer matches as a whole; no look-around, no back-references."""
    choices: Sequence[str] | None
    """Texts of which every answer is one."""
    lark: str | None
    """Grammar of every answer, in llguidance's dialect of Lark."""
    ignore_eos: bool
    """Go on past end-of-sequence tokens, up to `max_tokens`."""
    force_linked: bool
    """Serve `"linked"` even where the model's calibration forbids it."""
    no_bos: bool
    """Leave out the begin-of-sequence token that stands before the first part otherwise."""
    cache_salt: str
    """Keeps KV apart: this request shares it only with requests that have an equal salt, of at most 256 bytes. Empty
    (default): with those that have none."""
    timeout_s: float
    """Seconds for the whole answer, in place of the client's `timeout_s`; at most ten years."""
    request_id: str
    """Names this request in logs and traces: at most 128 bytes of printable ASCII. Default: a new random id."""


def check_options(given: Iterable[str], caller: str) -> None:
    """Raises `TypeError`, as Python does for any function, where `caller` was given a keyword it does not have."""
    for name in given:
        if name not in GenerateOptions.__annotations__:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
