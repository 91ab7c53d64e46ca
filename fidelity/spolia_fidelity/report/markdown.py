"""A report that a person reads: what was measured, the figures, how to read them, their limits."""

from __future__ import annotations

from collections.abc import Iterator

from spolia_fidelity.report.table import f1_table, summary_table, task_table
from spolia_fidelity.report.words import count, duration
from spolia_fidelity.result import EvalResult

READING = """\
- **recomputed**: share of the chunks' tokens computed in place. The rest is read from KV that was computed elsewhere.
- **ΔNLL**: how much less likely the policy makes the right tokens than full recompute does, in nats per token. 0.01
  nats is about 1 % in perplexity. Negative: the policy did better.
- **KL**: how far the policy's whole next-token distribution lies from full recompute's, in nats; 0 is the same. The
  99th percentile is that of the scored positions.
- **top-1 agreement**: share of positions where both would choose the same token when decoding greedily.
- **exact match** and **loss**: share of questions answered exactly, and how many percentage points of it the policy
  loses. **changed** counts questions that one of the two answers and the other does not, in either direction.
- Brackets hold intervals. Differences are paired by question, and whole contexts are resampled, since questions on one
  context hang together."""

LIMITS = """\
- The figures hold for this model, these weights, this number format and these inputs.
- Intervals say how the figures would move with other contexts from the same source, nothing else. With fewer than
  about 30 contexts they are too narrow.
- [0, 0] means that no question of this run differed. With n such questions, up to about 3 / n of others still may.
- Answers are scored with the right tokens given before each position, except where F1 is reported; an error early in
  a long generated answer can grow beyond what is seen here."""


def markdown_report(result: EvalResult, plot_name: str = "loss.svg") -> str:
    """The report's text. `plot_name` is the plot's file, beside the report."""
    parts = (
        f"# What reuse costs: {result.run.model}",
        _measured(result),
        "## Distance from full recompute",
        summary_table(result).markdown(),
        f"![Loss against the share of recomputed tokens, by policy]({plot_name})",
        *_tasks(result),
        *(("## Notes", "\n".join(f"- {note}" for note in result.notes)) if result.notes else ()),
        "## How to read it",
        READING,
        "## Limits",
        LIMITS,
        "## Inputs",
        "\n".join(_inputs(result)),
        "## Run",
        "\n".join(_run(result)),
    )
    return "\n\n".join(parts) + "\n"


def _measured(result: EvalResult) -> str:
    num_questions = sum(info.num_questions for info in result.inputs)
    num_cases = sum(info.num_cases for info in result.inputs)
    num_scored = sum(info.num_scored_tokens for info in result.inputs)
    names = ", ".join(f"`{policy.name}`" for policy in result.policies)
    return (
        f"{count(num_questions)} questions behind {count(num_cases)} contexts, {count(num_scored)} scored tokens, the "
        f"same token ids under every policy: {names}. Every figure is against full recompute by the same model. "
        f"Intervals: {100 * result.run.level:g} %, {count(result.run.num_resamples)} resamples, seed {result.run.seed}."
    )


def _tasks(result: EvalResult) -> Iterator[str]:
    if result.tasks:
        yield "## By task"
        yield task_table(result).markdown()
    generated = f1_table(result)
    if generated is not None:
        yield "Token F1 of generated answers, against the best of the accepted ones:"
        yield generated.markdown()


def _inputs(result: EvalResult) -> Iterator[str]:
    for info in result.inputs:
        skipped = f"; {count(info.num_skipped)} left out" if info.num_skipped else ""
        whole = f" of {count(info.num_records)}" if info.num_records > info.num_questions else ""
        yield (
            f"- **{info.name}** ({info.layout}): {count(info.num_questions)}{whole} questions, "
            f"{count(info.num_cases)} contexts in {count(info.num_clusters)} clusters, "
            f"{count(info.num_chunks)} chunks, {count(info.num_chunk_tokens)} chunk tokens{skipped}."
        )
        yield from (f"  - {note}" for note in info.notes)


def _run(result: EvalResult) -> Iterator[str]:
    run = result.run
    yield f"- model: {run.model}, fingerprint `{run.fingerprint[:16]}`, {run.dtype}"
    yield f"- time: {duration(run.seconds)}"
    for name, value in {**run.environment, **run.options}.items():
        if value not in (None, [], ()):
            words = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield f"- {name.replace('_', ' ')}: {words}"
