"""Laws of `spolia calibrate`: what it writes is what the engine reads, and no policy passes for want of data."""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness_worlds import DEMO, one_json

from spolia_core.errors import InvalidRequest, NotFound
from spolia_core.profile import PROFILE_FILE, LinkPolicy, find_profile, load_profile, profile_path
from spolia_engine.adapter import ModelAdapter
from spolia_fidelity import calibrate, evaluate, session
from spolia_fidelity.calibrate import DEFAULT_LADDER, DEFAULT_QUESTIONS, NOT_KEPT, main, parse_ladder
from spolia_fidelity.encoder import TextEncoder
from spolia_fidelity.options import Options
from spolia_fidelity.synthetic import synthetic_cases

pytestmark = pytest.mark.slow

SMALL = ("--chunks", "2", "--chunk-tokens", "320", "--threads", "1")
"""The random model has a token for each byte."""
ENOUGH = ("--questions", "190", *SMALL)
"""About nine questions a context: more contexts than a verdict needs."""


def test_bounds_that_all_keep_give_the_cheapest_and_a_profile_the_engine_finds(
    model: Path, adapter: ModelAdapter, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(model), "--policies", "link:4,naive,sinks:2", "--profile-dir", str(tmp_path), "--json"]
    assert main([*argv, "--max-nll-increase", "1000", *ENOUGH]) == 0
    said = one_json(capfd)
    profile = find_profile(model, tmp_path, adapter.fingerprint.hex())
    assert profile is not None
    assert profile.allows_linked
    assert profile.policy == LinkPolicy(0, 0)
    assert profile.bounds.max_nll_increase_nats == 1000
    assert (said["verdict"], said["policy"], said["profile"]) == ("kept", "naive", profile.name)
    assert said["path"] == str(profile_path(tmp_path, profile.fingerprint))
    assert {loss.policy for loss in profile.measured} == {"full", "link:4", "naive", "sinks:2"}
    assert profile.loss is not None
    assert profile.loss.task_loss_points is None  # random weights do no task
    assert profile.loss.breaks == ()
    notes = next(loss.details["notes"] for loss in profile.measured if loss.policy == "full")
    assert any("only the increase of the negative log-likelihood was judged" in note for note in notes)


def test_bounds_that_none_keeps_forbid_linked_with_an_exit_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(DEMO), "--policies", "naive,link:1", "--profile-dir", str(tmp_path), "--json"]
    assert main([*argv, "--questions", "210", *SMALL, "--chunk-tokens", "80"]) == NOT_KEPT == 5
    said = one_json(capfd)
    (path,) = tmp_path.iterdir()
    profile = load_profile(path)
    assert said["path"] == str(path)
    assert not profile.allows_linked
    assert profile.policy.name in ("naive", "link:1")  # what is used when forced
    assert profile.loss is not None
    broken = [m for m in said["judged"][profile.policy.name]["margins"] if m["verdict"] != "kept"]
    assert len(profile.loss.breaks) == len(broken) > 0
    for margin in broken:
        unit = "nats" if margin["figure"].startswith("ΔNLL") else "points"
        start = f"{margin['figure']} is {margin['value']:.3g} {unit}, at most {margin['high']:.3g}; the bound is "
        assert start + f"{margin['bound']:g}" in profile.loss.breaks
    assert profile.loss.breaks[0] in profile.why_forbidden()
    assert said["verdict"] == "broken"
    assert said["judged"]["naive"]["verdict"] == "broken"


def test_a_sample_too_small_is_said_to_be_and_allows_nothing(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(model), "--policies", "link:1000", "--dry-run"]
    assert main([*argv, "--questions", "30", *SMALL]) == NOT_KEPT  # recomputes everything, and still is not shown to
    assert "the sample is too small to decide" in capfd.readouterr().out


def test_figures_of_too_few_contexts_are_said_to_be(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(model), "--policies", "link:1000", "--profile-dir", str(tmp_path), "--json"]
    assert main([*argv, "--questions", "30", *SMALL]) == NOT_KEPT
    one_json(capfd)
    (path,) = tmp_path.iterdir()
    assert "of too few contexts to decide; the bound is 0.01" in load_profile(path).why_forbidden()


def test_a_profile_that_cannot_be_written_costs_neither_what_was_found_nor_the_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrate, "save_profile", full_disk)
    argv = ["--model", str(model), "--policies", "naive", "--profile-dir", str(tmp_path), "--json"]
    with pytest.raises(InvalidRequest, match="No space left on device"):
        main([*argv, "--report", str(tmp_path / "report"), "--questions", "10", *SMALL])
    assert one_json(capfd)["kind"] == "spolia-calibrate"
    assert (tmp_path / "report" / "report.md").is_file()


@pytest.mark.parametrize(("flags", "word"), [([], b"dNLL of synthetic"), (["--json"], b"\\u0394NLL of synthetic")])
def test_the_verdict_is_printed_where_only_ascii_can_be(
    model: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], word: bytes
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    argv = ["--model", str(model), "--policies", "naive", "--dry-run", "--questions", "10", *SMALL]
    assert main([*argv, *flags]) == NOT_KEPT
    sys.stdout.flush()
    assert word in written.getvalue()


def test_a_dry_run_writes_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["--model", str(model), "--policies", "naive", "--dry-run", "--json", "--questions", "10", *SMALL])
    assert one_json(capfd)["path"] is None
    assert not (model / PROFILE_FILE).exists()


@pytest.mark.parametrize("names", ["full", "prefix,naive", "cacheblend:0.16"])
def test_what_cannot_be_served_is_no_candidate(names: str) -> None:
    with pytest.raises(InvalidRequest, match="not served"):
        parse_ladder(names)


def test_the_default_ladder_can_be_served_and_begins_with_the_cheapest() -> None:
    links = [policy.policy.num_link_tokens for policy in parse_ladder(DEFAULT_LADDER)]
    assert links == sorted(links)
    assert links[0] == 0


def test_by_default_every_task_stands_in_more_contexts_than_a_bound_of_one_point_needs() -> None:
    sizes = Options(DEMO)
    found = synthetic_cases(
        TextEncoder.from_model(DEMO),
        seed=sizes.seed,
        num_questions=DEFAULT_QUESTIONS,
        num_chunks=sizes.num_chunks,
        chunk_tokens=sizes.chunk_tokens,
    )
    contexts = Counter(task for case in found.cases for task in {question.task for question in case.questions})
    assert set(contexts) == {"fact", "cut", "pronoun", "two_hop"}
    assert min(contexts.values()) >= 368


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        (["--max-nll-increase", "-1"], "max-nll-increase"),
        (["--max-task-loss", "nan"], "max-task-loss"),
        (["--policies", "full"], "policies"),
        (["--policies", ""], "policies"),
        (["--profile-dir", "nowhere"], "profile-dir"),
        (["--profile-dir", "/proc"], "profile-dir"),  # whatever its permissions say, no file can be made there
        (["--dry-run", "--report", "/proc/report"], "report"),
    ],
)
def test_wrong_requests_are_refused_before_the_model_is_loaded(
    model: Path, argv: list[str], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded for a request that is wrong")

    monkeypatch.setattr(session.ModelAdapter, "load", refuse)
    with pytest.raises(InvalidRequest) as refused:
        main(["--model", str(model), *argv])
    assert refused.value.field == field


def test_a_model_that_is_not_there_is_said_to_be_as_the_other_command_says_it() -> None:
    for command in (main, evaluate.main):
        with pytest.raises(NotFound, match=r"no config\.json in /nonexistent"):
            command(["--model", "/nonexistent"])
