"""The demo model at 8 × 128 tokens: its times, beside what the policy it is served with was measured to lose."""

from __future__ import annotations

import json
import random
from typing import Any

from tokenizers import Tokenizer

from spolia import Document, Result, ReuseMode, TokenSource
from spolia_bench.frame import Report, Sample, Table, progress
from spolia_bench.reuse.options import Options
from spolia_bench.reuse.prompts import Asked
from spolia_bench.reuse.system import System, running
from spolia_bench.texts import text_of

NUM_DOCUMENTS = 8
DOCUMENT_TOKENS = 128
REPEATS_PER_ROUND = 3


def measure(report: Report, options: Options) -> None:
    """The section "demo". Raises `RuntimeError` where a node serves by another profile than is quoted."""
    model = options.demo_model
    profile = json.loads((model / "spolia-profile.json").read_text())
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rng = random.Random(f"demo-{options.seed}")
    full: list[Result] = []
    linked: list[Result] = []
    with running(model, options.threads, []) as system:
        for number in range(options.rounds + 1):
            exact, reused = _round(system, tokenizer, rng)
            if number:
                full.append(exact)
                linked += reused
    if linked[-1].reuse.profile != profile["name"]:
        raise RuntimeError(f"served by profile {linked[-1].reuse.profile}, {model} has {profile['name']}")
    progress("demo model: done")
    full_ttft, linked_ttft = (Sample(tuple(r.ttft_ms for r in results)) for results in (full, linked))
    _report(report, profile, full_ttft, linked_ttft, linked[-1])


def _round(system: System, tokenizer: Tokenizer, rng: random.Random) -> tuple[Result, list[Result]]:
    documents = tuple(Document(_text(DOCUMENT_TOKENS, tokenizer, rng)) for _ in range(NUM_DOCUMENTS))
    asked = Asked(documents, "Question: What is the colour of the door?\nAnswer:")

    def ask(prompt: Asked, mode: ReuseMode) -> Result:
        return system.client.generate(prompt.parts, mode=mode, max_tokens=2, ignore_eos=True, seed=0)

    full = ask(asked, ReuseMode.EXACT)
    if full.reuse.num_reused_tokens:
        raise RuntimeError(f"new documents were reused: {dict(full.reuse.sources)}")
    orders = [asked.led_by(number, rng) for number in range(1, REPEATS_PER_ROUND + 2)]
    linked = [ask(order, ReuseMode.LINKED) for order in orders][1:]
    for result in linked:
        expected = NUM_DOCUMENTS * (DOCUMENT_TOKENS - 2 - result.reuse.link_tokens_per_chunk)
        if result.reuse.sources.get(TokenSource.DEVICE, 0) < expected or result.reuse.bytes_moved:
            raise RuntimeError(f"documents were not on the node: {dict(result.reuse.sources)}")
    return full, linked


def _text(num_tokens: int, tokenizer: Tokenizer, rng: random.Random) -> str:
    """New text of `num_tokens` tokens, or one or two fewer where the last word is cut differently."""
    text = text_of(num_tokens * 8, rng)
    end = tokenizer.encode(text, add_special_tokens=False).offsets[num_tokens - 1][1]
    return text[:end]


def _report(report: Report, profile: dict[str, Any], full: Sample, linked: Sample, last: Result) -> None:
    served = next(m for m in profile["measured"] if m["policy"] == profile["policy"])
    report.figures |= {
        "demo_ttft_full_ms": round(full.median_ms, 2),
        "demo_ttft_linked_ms": round(linked.median_ms, 2),
        "demo_ratio_full_over_linked": round(full.median_ms / linked.median_ms, 2),
        "demo_num_prompt_tokens": last.num_prompt_tokens,
        "demo_profile": profile["name"],
        "demo_policy": profile["policy"],
        "demo_nll_increase_nats": served["nll_increase_nats"],
        "demo_task_loss_points": served["task_loss_points"],
        "demo_recomputed_share": served["recomputed_share"],
    }
    table = Table(("demo model", "full TTFT ms", "linked TTFT ms", "ratio", "ΔNLL, nats", "worst task, points lost"))
    table.rows.append(
        (
            f"{NUM_DOCUMENTS} × {DOCUMENT_TOKENS} tokens, {profile['policy']}",
            str(full),
            str(linked),
            f"{full.median_ms / linked.median_ms:.1f}",
            f"{served['nll_increase_nats']:.4f}",
            f"{served['task_loss_points']:.2f}",
        )
    )
    report.tables.append(table)
