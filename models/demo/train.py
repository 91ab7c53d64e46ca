"""Trains the demo model: `python -m models.demo.train --prose books.jsonl.gz --minutes 60`.

Everything follows from the seed. The state of the run is kept in a folder outside version control and picked
up again by the next call; the checkpoint in Hugging Face format is written at the end of every call.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from spolia_fidelity.tasks import TASKS

from .batches import Batch, make_batch, make_prose_batch
from .curriculum import STAGES
from .network import Network, Shape
from .prose import read_prose, split_prose
from .stage import Stage
from .state import Progress, Run, open_run, tokenizer_path
from .threads import ThreadCount
from .tokenizer import generated_texts, special_ids, train_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # parts are short, and the cores are busy
_FOLDER = Path(__file__).parent
_PROSE_TOKENS = 256
_WARM_UP_STEPS = 100
_RECENT = 0.95  # decay of the running means
_REPORT_STEPS = 25


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured: share of right answers, in all and per task, and the loss on prose (None without)."""

    accuracy: float
    by_task: dict[str, float]
    prose_loss: float | None
    tokens: int


def train_step(network: Network, optimizer: torch.optim.Optimizer, batch: Batch, prose: Batch | None) -> StepResult:
    """One update from documents and, where given, prose; gradients of both are added before the step."""
    optimizer.zero_grad(set_to_none=True)
    logits = network(batch)
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    torch.autograd.backward((losses * batch.weights).sum() / batch.weights.sum())
    prose_loss, tokens = None, batch.num_tokens
    if prose is not None:
        loss = F.cross_entropy(network(prose), prose.targets)
        torch.autograd.backward(0.5 * loss)
        prose_loss, tokens = loss.item(), tokens + prose.num_tokens
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    right = _right_answers(logits, batch)
    by_task = {
        task: right[batch.tasks == index].mean().item()
        for index, task in enumerate(TASKS)
        if bool((batch.tasks == index).any())
    }
    return StepResult(right.mean().item(), by_task, prose_loss, tokens)


def learning_rate(base: float, progress: Progress, stage: Stage) -> float:
    """Linear warm-up over the first steps, then the stage's factor, moving linearly to its last one."""
    moved = min(1.0, progress.stage_step / stage.max_steps)
    factor = stage.rate + (stage.last_rate - stage.rate) * moved
    return base * factor * min(1.0, (progress.step + 1) / _WARM_UP_STEPS)


def _right_answers(logits: Tensor, batch: Batch) -> Tensor:
    """1 for every answer all of whose tokens are the likeliest, else 0."""
    asked = batch.answers >= 0
    wrong = (logits.detach()[asked].argmax(-1) != batch.targets[asked]).float()
    missed = torch.zeros(len(batch.tasks)).index_add_(0, batch.answers[asked], wrong)
    return (missed == 0).float()


def prepare_tokenizer(folder: Path, prose: list[str], vocab: int, seed: int) -> Tokenizer:
    """Loads the run's tokenizer, or learns it from the openings of the prose and from generated texts."""
    path = tokenizer_path(folder)
    if not path.exists():
        openings = [text[:60_000] for text in prose]
        train_tokenizer([*openings, *generated_texts(seed, 4000)], vocab).save(str(path))
    return Tokenizer.from_file(str(path))


def prepare_prose(folder: Path, prose: list[str], tokenizer: Tokenizer) -> Tensor | None:
    """The training part of the prose as one stream of ids, int32, cached; None without prose."""
    path = folder / "prose.pt"
    if not path.exists() and prose:
        parts = [text[start : start + 20_000] for text in prose for start in range(0, len(text), 20_000)]
        encoded = tokenizer.encode_batch(parts, add_special_tokens=False)
        torch.save(torch.tensor([token for part in encoded for token in part.ids], dtype=torch.int32), path)
    ids: Tensor | None = torch.load(path) if path.exists() else None
    return ids


def train(run: Run, prose: Tensor | None, *, rate: float, minutes: float, threads: int, save_every_s: float) -> None:
    """Trains until the time is up or the curriculum is done, saving on the way."""
    progress, before, started = run.progress, run.progress.trained_s, time.monotonic()
    saved_at, count = started, ThreadCount(threads)
    while progress.stage < len(STAGES) and time.monotonic() - started < 60 * minutes:
        stage = STAGES[progress.stage]
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(rate, progress, stage)
        batch, prose_batch = _batches(run, prose, stage)
        _note(progress, train_step(run.network, run.optimizer, batch, prose_batch))
        count.update()
        progress.trained_s = before + time.monotonic() - started
        if progress.step % _REPORT_STEPS == 0:
            _report(progress, stage)
        if progress.accuracy >= stage.pass_at or progress.stage_step >= stage.max_steps:
            _advance(progress, stage)
        if time.monotonic() - saved_at > save_every_s:
            saved_at = time.monotonic()
            run.save()


def _batches(run: Run, prose: Tensor | None, stage: Stage) -> tuple[Batch, Batch | None]:
    batch = make_batch(run.tokenizer, stage, run.seed, run.progress.stage_step)
    if prose is None or not stage.prose_rows:
        return batch, None
    bos, _ = special_ids(run.tokenizer)
    return batch, make_prose_batch(prose, stage.prose_rows, _PROSE_TOKENS, run.seed, run.progress.step, bos)


def _advance(progress: Progress, stage: Stage) -> None:
    _report(progress, stage)
    progress.history.append(f"{stage.name}: {progress.stage_step} steps, until {progress.trained_s:.0f} s")
    progress.stage, progress.stage_step, progress.accuracy = progress.stage + 1, 0, 0.0


def _note(progress: Progress, result: StepResult) -> None:
    progress.step += 1
    progress.stage_step += 1
    progress.tokens += result.tokens
    progress.accuracy = _RECENT * progress.accuracy + (1 - _RECENT) * result.accuracy
    for task, accuracy in result.by_task.items():
        progress.by_task[task] = _RECENT * progress.by_task.get(task, accuracy) + (1 - _RECENT) * accuracy
    if result.prose_loss is not None:
        unset = progress.prose_loss != progress.prose_loss
        old = result.prose_loss if unset else progress.prose_loss
        progress.prose_loss = _RECENT * old + (1 - _RECENT) * result.prose_loss


def _report(progress: Progress, stage: Stage) -> None:
    unbiased = progress.accuracy / (1 - _RECENT**progress.stage_step)
    tasks = " ".join(f"{task} {share:.3f}" for task, share in sorted(progress.by_task.items()))
    print(
        f"{progress.trained_s:6.0f} s  step {progress.step:5d}  {stage.name} {progress.stage_step}"
        f"  right {unbiased:.3f}  {tasks}  prose {progress.prose_loss:.3f}"
        f"  {progress.tokens / progress.trained_s:.0f} tokens/s",
        flush=True,
    )


class _TerminatedError(Exception):
    """The process was asked to stop."""


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--prose", type=Path, nargs="*", default=[], help="plain text, .gz, or .jsonl.gz with `text`")
    add("--minutes", type=float, default=60.0, help="stop after this long; call again to go on")
    add("--out", type=Path, default=_FOLDER, help="folder of the checkpoint")
    add("--state", type=Path, default=_FOLDER / ".train", help="folder of the state of the run")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--rate", type=float, default=3e-3, help="highest learning rate")
    add("--vocab", type=int, default=3072)
    add("--hidden", type=int, default=128)
    add("--layers", type=int, default=4)
    add("--mlp", type=int, default=320)
    add("--save-every-s", type=float, default=120.0)
    return parser.parse_args()


def main() -> None:
    """Starts or resumes a run, and writes its checkpoint at the end. SIGTERM ends it early."""
    options = _options()
    options.state.mkdir(parents=True, exist_ok=True)
    texts = split_prose(read_prose(options.prose)).train
    tokenizer = prepare_tokenizer(options.state, texts, options.vocab, options.seed)
    prose = prepare_prose(options.state, texts, tokenizer)
    shape = Shape(tokenizer.get_vocab_size(), options.hidden, options.layers, mlp=options.mlp)
    run = open_run(options.state, tokenizer, shape, options.seed)
    print(
        f"{sum(p.numel() for p in run.network.parameters())} parameters, from step {run.progress.step}",
        flush=True,
    )
    signal.signal(signal.SIGTERM, _terminate)
    with contextlib.suppress(_TerminatedError):
        train(
            run,
            prose,
            rate=options.rate,
            minutes=options.minutes,
            threads=options.threads,
            save_every_s=options.save_every_s,
        )
    run.save()
    run.write_checkpoint(options.out)


if __name__ == "__main__":
    main()
