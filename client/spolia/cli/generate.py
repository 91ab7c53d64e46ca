"""`spolia generate`: one answer."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from spolia.cli.options import (
    DEFAULT_ADDRESS,
    Address,
    Json,
    Model,
    Retry,
    SplitMaxTokens,
    SplitterOption,
    Timeout,
    name_of,
)
from spolia.cli.output import notes, plain, print_json
from spolia.cli.texts import read_document
from spolia.cli.units import counted, human_bytes
from spolia.client import Client
from spolia.errors import InvalidRequest
from spolia.options import GenerateOptions
from spolia.parts import Document, Part
from spolia.results import Result
from spolia.stream import Stream
from spolia_core.reuse import ReuseMode


class ModeName(StrEnum):
    """Reuse modes as the command line names them."""

    EXACT = "exact"
    LINKED = "linked"


def generate(
    parts: Annotated[
        list[str] | None, typer.Argument(help="Text of the prompt, after the documents; - reads standard input.")
    ] = None,
    document: Annotated[
        list[Path] | None, typer.Option("--document", "-d", help="File to put before the text; its KV is reused.")
    ] = None,
    mode: Annotated[
        ModeName, typer.Option(help="linked reuses documents at any position; approximate.")
    ] = ModeName.EXACT,
    splitter: SplitterOption = None,
    split_max_tokens: SplitMaxTokens = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to produce; default 256.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; default: the gateway draws one.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="File with the JSON schema of the answer.", exists=True, dir_okay=False)
    ] = None,
    json_object: Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")] = False,
    regex: Annotated[str | None, typer.Option(help="The whole answer matches this expression.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The answer is this text, or another one given so; give several.")
    ] = None,
    lark: Annotated[
        Path | None, typer.Option(help="File with the grammar of the answer.", exists=True, dir_okay=False)
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of sequence.")] = False,
    n: Annotated[int, typer.Option("-n", help="Answers to draw; with more than one, each is printed whole.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="Tell, in --json, how likely each token and this many others were.")
    ] = None,
    force_linked: Annotated[
        bool, typer.Option("--force-linked", help="Serve linked where the model's calibration forbids it.")
    ] = False,
    stream: Annotated[bool, typer.Option(help="Print the text as it comes.")] = True,
    model: Model = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    retry: Retry = 5.0,
    as_json: Json = False,
) -> None:
    """Answer a prompt: documents first, then text.

    The text goes to standard output; what was reused and how long it took to standard error.
    """
    options: GenerateOptions = {
        "mode": mode.value,
        "splitter": name_of(splitter),
        "split_max_tokens": split_max_tokens,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or (),
        "n": n,
        "logprobs": logprobs,
        "json_schema": None if json_schema is None else read_document(json_schema),
        "json_object": json_object,
        "regex": regex,
        "choices": choice or None,
        "lark": None if lark is None else read_document(lark),
        "ignore_eos": ignore_eos,
        "force_linked": force_linked,
    }
    prompt = _prompt(document or [], parts or [])
    with (
        Client(address, timeout_s=timeout, retry_s=retry, model=model) as client,
        client.stream(prompt, **options) as answer,
    ):
        if as_json:
            print_json(_report(answer.result()))
            return
        if n == 1:
            _print_text(answer, as_it_comes=stream)
        else:
            _print_samples(answer.result())
        notes().print(_summary(answer.result()), style="dim", markup=False)


def _prompt(documents: list[Path], texts: list[str]) -> list[Part]:
    prompt: list[Part] = [Document(read_document(path), name=str(path)) for path in documents]
    prompt += [sys.stdin.read() if text == "-" else text for text in texts]
    if not prompt:
        raise InvalidRequest("give text, or a file with --document", field="parts")
    return prompt


def _print_text(answer: Stream, *, as_it_comes: bool) -> None:
    for delta in answer:
        if as_it_comes:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    print("" if as_it_comes else answer.result().text, flush=True)


def _print_samples(result: Result) -> None:
    for index, sample in enumerate(result.samples):
        print(f"[{index}] {sample.text}", flush=True)


def _summary(result: Result) -> str:
    reuse = result.reuse
    line = (
        f"{counted(result.num_generated_tokens, 'token')} ({result.finish_reason.name.lower()}), "
        f"first after {result.ttft_ms:.0f} ms, all after {result.e2e_ms:.0f} ms; {reuse.mode.name.lower()}: "
        f"{reuse.num_reused_tokens} of {counted(result.num_prompt_tokens, 'prompt token')} reused, "
        f"{human_bytes(reuse.bytes_moved)} moved"
    )
    if reuse.mode is ReuseMode.LINKED:
        line += f"\nprofile {reuse.profile}: {counted(reuse.link_tokens_per_chunk, 'link token')} per chunk"
        line += "; it forbids linked, which was forced" if reuse.forced else ""
    return line + "".join(
        f"\nmissed {counted(m.num_tokens, 'token')} of a {m.kind.name.lower()} chunk: "
        f"{m.reason.name.lower().replace('_', ' ')}"
        for m in reuse.misses
    )


def _report(result: Result) -> object:
    report = plain(result)
    assert isinstance(report, dict)
    report["mode"] = plain(result.mode)
    report["reuse"]["num_reused_tokens"] = result.reuse.num_reused_tokens
    report["reuse"]["bytes_moved"] = result.reuse.bytes_moved
    return report
