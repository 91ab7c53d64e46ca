"""One run: load the model, make the cases, run the policies, make figures of what they did."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from spolia_core.errors import NotFound
from spolia_engine.adapter import ModelAdapter
from spolia_fidelity.bootstrap import DEFAULT_LEVEL, DEFAULT_RESAMPLES
from spolia_fidelity.case_set import CaseSet
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.environment import environment
from spolia_fidelity.figures import figures_of
from spolia_fidelity.generation import MIN_ABLE_SHARE
from spolia_fidelity.inputs import InputOptions, load_cases, source_names
from spolia_fidelity.measures import Outcome
from spolia_fidelity.options import Options
from spolia_fidelity.policy import Policy
from spolia_fidelity.progress import Progress
from spolia_fidelity.result import EvalResult, PolicyResult, RunInfo
from spolia_fidelity.runner import REFERENCE, PolicyRun, Runner
from spolia_fidelity.synthetic import synthetic_cases

Outcomes = Mapping[str, Sequence[Outcome]]
"""By policy name: all questions, in the same order."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, and its tokenizer as parts are encoded."""

    adapter: ModelAdapter
    encoder: TextEncoder


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures, and the outcomes they were made of."""

    result: EvalResult
    outcomes: Outcomes
    sets: tuple[CaseSet, ...]


def check_model(folder: Path) -> None:
    """Raises `NotFound` where there is no model: before anything else is done with its folder."""
    if not (folder / "config.json").is_file():
        raise NotFound(f"no config.json in {folder}", field="model", actual=str(folder))


def load(options: Options, progress: Progress) -> Model:
    """Loads the model and sets the number of threads. Raises the errors of `ModelAdapter.load`."""
    torch.set_num_threads(options.num_threads)
    progress.note(f"model {options.model}, {options.num_threads} threads")
    disable_progress_bar()  # transformers would write its own to standard error, terminal or not
    return Model(
        ModelAdapter.load(options.model, dtype=options.dtype),
        TextEncoder.from_model(options.model),
    )


def measure(model: Model, options: Options, policies: Sequence[Policy], progress: Progress) -> Measured:
    """Everything that was asked for. Full recompute is measured as well where `policies` leave it out.

    Deterministic for options and policies, but for times. Raises the errors of the inputs and of `Runner.run`.
    """
    started = time.perf_counter()
    adapter, encoder = model.adapter, model.encoder
    runner = Runner(adapter, encoder.decode, policies)  # refuses what this model cannot do before texts are made
    sets = case_sets(options, encoder, adapter)
    cases = [case for found in sets for case in found.cases]
    with progress.bar("contexts", len(cases)) as advance:
        runs = runner.run(cases, advance)
    progress.note("intervals")
    outcomes, notes = without_undoable({name: run.outcomes for name, run in runs.items()})
    run = RunInfo(
        model=str(options.model),
        fingerprint=adapter.fingerprint.hex(),
        dtype=options.dtype,
        seed=options.seed,
        num_resamples=DEFAULT_RESAMPLES,
        level=DEFAULT_LEVEL,
        seconds=time.perf_counter() - started,
        environment=environment(),
        options={**options.described(), "threads": options.num_threads},
    )
    results = policy_results(runs, outcomes, options.seed)
    return Measured(EvalResult(run, tuple(found.info for found in sets), results, notes), outcomes, sets)


def case_sets(options: Options, encoder: TextEncoder, adapter: ModelAdapter) -> tuple[CaseSet, ...]:
    """Generated texts, then every file, in the order given."""
    sets: list[CaseSet] = []
    if options.num_questions:
        sets.append(
            synthetic_cases(
                encoder,
                seed=options.seed,
                num_questions=options.num_questions,
                num_chunks=options.num_chunks,
                chunk_tokens=options.chunk_tokens,
                generate=options.generate,
            )
        )
    reading = InputOptions(
        max_context_tokens=adapter.max_context_tokens,
        seed=options.seed,
        max_cases=options.max_contexts,
        max_chunk_tokens=options.passage_tokens,
        num_passages=options.num_chunks,
        text_chunks=options.num_chunks,
        text_chunk_tokens=options.chunk_tokens,
    )
    files = (*options.texts, *options.qa_files)
    named = zip(files, source_names(files), strict=True)
    return (*sets, *(load_cases(path, encoder, reading, name) for path, name in named))


def without_undoable(outcomes: Outcomes) -> tuple[Outcomes, tuple[str, ...]]:
    """Outcomes without exact match where the model cannot do a task, and a note on each such task.

    Below `MIN_ABLE_SHARE` of right answers under full recompute there is nothing that a policy could lose; a loss of
    zero would read as if nothing was lost.
    """
    notes: list[str] = []
    undoable: set[str] = set()
    for task in dict.fromkeys(outcome.task for outcome in outcomes[REFERENCE]):
        exacts = [o.exact for o in outcomes[REFERENCE] if o.task == task and o.exact is not None]
        if exacts and sum(exacts) < MIN_ABLE_SHARE * len(exacts):
            undoable.add(task)
            notes.append(
                f"The model cannot do the task {task}: full recompute answers {sum(exacts)} of {len(exacts)} questions "
                "right, so no loss is reported; the task's likelihoods and divergences are."
            )
    kept = {
        name: [replace(o, exact=None, f1=None) if o.task in undoable else o for o in found]
        for name, found in outcomes.items()
    }
    return kept, tuple(notes)


def policy_results(runs: Mapping[str, PolicyRun], outcomes: Outcomes, seed: int) -> tuple[PolicyResult, ...]:
    """Costs and figures of every policy, in the order run."""
    figures = figures_of(outcomes, REFERENCE, seed=seed)
    return tuple(
        PolicyResult(
            name=name,
            recomputed_tokens=run.recomputed_tokens,
            reused_tokens=run.reused_tokens,
            seconds=run.seconds,
            overall=figures[name].overall,
            tasks=figures[name].tasks,
        )
        for name, run in runs.items()
    )
