"""A context: what a sequence has read, as an ordered list of spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from spolia_engine.extent import Extent
from spolia_engine.pool import Pool
from spolia_engine.run import Run, SlotRange, Span, coalesce


@dataclass(slots=True, eq=False)
class Context:
    """Spans covering positions 0 … `num_tokens`, in order, each token once.

    Holds a reference on every extent it names, once per entry of `extents`; `close` gives them back. `last_hidden`
    [hidden] is the final hidden state of the last token, None where no token is to be drawn after it. `behind_sinks`
    says that some KV was compiled behind dummy sinks that are not part of the context. `live` is the run of what was
    computed for this context, None where nothing was.
    """

    pool: Pool
    spans: list[Span]
    extents: list[Extent]
    last_hidden: Tensor | None = None
    num_computed_tokens: int = 0
    behind_sinks: bool = False
    live: Run | None = None
    _closed: bool = field(default=False)

    @property
    def num_tokens(self) -> int:
        """Tokens the context holds."""
        return sum(span.num_tokens for span in self.spans)

    @property
    def is_exact(self) -> bool:
        """Whether all KV is that of full recompute; False where a chunk was moved or compiled behind sinks."""
        return not self.behind_sinks and all(span.offset == 0 for span in self.spans)

    @property
    def ranges(self) -> list[SlotRange]:
        """What attention reads: spans that lie side by side in memory are one range."""
        return coalesce(self.spans)

    @property
    def closed(self) -> bool:
        """Whether the context has given back what it held."""
        return self._closed

    def shared(self) -> Context:
        """The same context once more, with a reference of its own on everything it names. This one stays open."""
        for extent in self.extents:
            self.pool.retain(extent)
        return replace(self, spans=list(self.spans), extents=list(self.extents))

    def close(self) -> None:
        """Releases everything the context holds. Safe to call twice."""
        if not self._closed:
            self._closed = True
            release_all(self.pool, self.extents)

    def check_invariants(self) -> None:
        """Asserts that spans cover positions from 0 without gap or overlap."""
        position = 0
        for span in self.spans:
            assert span.first_position == position, (span.first_position, position)
            assert 0 <= span.start < span.end <= span.run.num_tokens
            position += span.num_tokens


def release_all(pool: Pool, extents: Iterable[Extent]) -> None:
    """Gives one reference on each extent back."""
    for extent in extents:
        pool.release(extent)


def whole(run: Run) -> Span:
    """The span of all tokens of a run, standing where its keys are rotated to."""
    return Span(run, 0, run.num_tokens, 0)


def release_runs(pool: Pool, runs: Sequence[Run]) -> None:
    """Gives one reference on the extent of each run back."""
    release_all(pool, [run.extent for run in runs])
