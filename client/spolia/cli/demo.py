"""`spolia demo`: a cluster answers questions over documents, computing their KV, then reusing it in another order."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.demo_texts import Question, Samples, load_samples
from spolia.cli.options import Json
from spolia.cli.output import notes, plain, print_columns, print_json
from spolia.client import Client
from spolia.local_cluster import LocalCluster
from spolia.parts import Document, Part
from spolia.results import Result
from spolia_core.reuse import ReuseMode, TokenSource


@dataclass(frozen=True, slots=True)
class _Round:
    """One way to ask."""

    title: str
    mode: ReuseMode
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class _Answered:
    round: _Round
    question: Question
    result: Result


def demo(
    model: Annotated[Path, typer.Option("--model", "-m", help="Hugging Face-format folder of the model to serve.")],
    prefill: Annotated[int, typer.Option(min=0, help="How many prefill nodes.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="How many decode nodes.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the documents' second order.")] = 0,
    log_dir: Annotated[Path | None, typer.Option(help="Where the logs go; default: a new temporary folder.")] = None,
    as_json: Json = False,
) -> None:
    """Start a cluster, ask questions over documents, and show what was computed and what was reused.

    Gateway, prefill, decode and kvstore run as separate processes that speak gRPC, as they do in production.
    """
    samples = load_samples(model)
    started = time.monotonic()
    cluster = LocalCluster(model, num_prefill=prefill, num_decode=decode, log_dir=log_dir)
    try:
        with notes().status("starting the cluster"):
            cluster.start()
        if not as_json:
            _show_cluster(cluster, time.monotonic() - started)
        with Client(cluster.address) as client:
            answers = _ask_all(client, samples, max_tokens, seed, quiet=as_json)
    finally:
        cluster.stop()
    if as_json:
        print_json({"model": model.resolve().name, "answers": [_as_json(answer) for answer in answers]})


def _ask_all(client: Client, samples: Samples, max_tokens: int, seed: int, *, quiet: bool) -> list[_Answered]:
    given = samples.documents
    # Rounds begin with different documents, else they would share a prefix, and show that.
    turned_once, shuffled = given[1:] + given[:1], tuple(random.Random(seed).sample(given, len(given)))
    if shuffled[0] in (given[0], turned_once[0]):
        shuffled = given[2:] + given[:2]
    rounds = (
        _Round("exact: computed once; a prefix that repeats is reused", ReuseMode.EXACT, given),
        _Round("linked, first time: each document is computed on its own", ReuseMode.LINKED, turned_once),
        _Round("linked, another order: documents are reused where they now stand", ReuseMode.LINKED, shuffled),
    )
    answers: list[_Answered] = []
    for number, round_ in enumerate(rounds):
        if not quiet:
            print(f"\n{number + 1}. {round_.title}\n   order: {', '.join(d.name for d in round_.documents)}\n")
        # Each round asks something else first, so that only documents can be reused between them.
        turned = samples.questions[number:] + samples.questions[:number]
        here = [_ask(client, round_, question, max_tokens, seed) for question in turned[:3]]
        if not quiet:
            _show(here)
        answers += here
    return answers


def _ask(client: Client, round_: _Round, question: Question, max_tokens: int, seed: int) -> _Answered:
    parts: list[Part] = [*round_.documents, question.text]
    result = client.generate(parts, mode=round_.mode, max_tokens=max_tokens, seed=seed, stop=["\n"])
    return _Answered(round_, question, result)


def _show_cluster(cluster: LocalCluster, elapsed_s: float) -> None:
    print_columns(("node", "address", "pid"), *((n.name, n.address, str(n.pid)) for n in cluster.nodes))
    print(f"\n{len(cluster.nodes)} processes, ready after {elapsed_s:.1f} s; logs in {cluster.log_dir}")
    print(f"OpenAI's clients: base URL http://{cluster.http_address}/v1")


def _show(answers: Sequence[_Answered]) -> None:
    rows = [("   question", "answer", "first token", "prompt", "computed", "recomputed to link", "reused")]
    for answer in answers:
        result, sources = answer.result, answer.result.reuse.sources
        computed = sources.get(TokenSource.COMPUTED, 0) + sources.get(TokenSource.COMPILED, 0)
        rows.append(
            (
                "   " + _short(answer.question.text),
                result.text.strip() + _verdict(answer),
                f"{result.ttft_ms:.0f} ms",
                str(result.num_prompt_tokens),
                str(computed),
                str(result.reuse.num_link_tokens),
                str(result.reuse.num_reused_tokens),
            )
        )
    print_columns(*rows)


def _short(question: str) -> str:
    return question.removeprefix("Question:").removesuffix("Answer:").strip()


def _is_right(answer: _Answered) -> bool | None:
    expected = answer.question.answer.strip()
    return answer.result.text.strip() == expected if expected else None


def _verdict(answer: _Answered) -> str:
    right = _is_right(answer)
    return "" if right is None else "  ✓" if right else f"  ✗ ({answer.question.answer.strip()})"


def _as_json(answer: _Answered) -> object:
    report = plain(answer.result)
    assert isinstance(report, dict)
    documents = [document.name for document in answer.round.documents]
    return (
        {"round": answer.round.title, "documents": documents, "question": answer.question.text}
        | report
        | {"is_right": _is_right(answer)}
    )
