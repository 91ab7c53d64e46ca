"""Laws of `spolia calibrate`: what it writes is what the engine reads, and no policy passes for want of data."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness_worlds import DEMO, one_json

from spolia_core.errors import InvalidRequest
from spolia_core.profile import PROFILE_FILE, LinkPolicy, find_profile, load_profile, profile_path
from spolia_engine.adapter import ModelAdapter
from spolia_fidelity import session
from spolia_fidelity.calibrate import DEFAULT_LADDER, NOT_KEPT, main, parse_ladder

SMALL = ("--chunks", "2", "--chunk-tokens", "64", "--threads", "1")
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
    notes = next(loss.details["notes"] for loss in profile.measured if loss.policy == "full")
    assert any("only the increase of the negative log-likelihood was judged" in note for note in notes)


def test_bounds_that_none_keeps_forbid_linked_with_an_exit_status(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(DEMO), "--policies", "naive,link:1", "--profile-dir", str(tmp_path), "--json"]
    assert main([*argv, "--questions", "210", *SMALL]) == NOT_KEPT == 5
    said = one_json(capfd)
    (path,) = tmp_path.iterdir()
    profile = load_profile(path)
    assert said["path"] == str(path)
    assert not profile.allows_linked
    assert profile.policy.name in ("naive", "link:1")  # what is used when forced
    assert "points of the tasks" in profile.why_forbidden()
    assert said["verdict"] == "broken"
    assert said["judged"]["naive"]["verdict"] == "broken"


def test_a_sample_too_small_is_said_to_be_and_allows_nothing(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(model), "--policies", "link:1000", "--dry-run"]
    assert main([*argv, "--questions", "30", *SMALL]) == NOT_KEPT  # recomputes everything, and still is not shown to
    assert "the sample is too small to decide" in capfd.readouterr().out


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


@pytest.mark.parametrize(
    "argv",
    [
        ["--max-nll-increase", "-1"],
        ["--max-task-loss", "nan"],
        ["--policies", "full"],
        ["--profile-dir", "nowhere"],
    ],
)
def test_wrong_requests_are_refused_before_the_model_is_loaded(
    model: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded for a request that is wrong")

    monkeypatch.setattr(session.ModelAdapter, "load", refuse)
    with pytest.raises(InvalidRequest):
        main(["--model", str(model), *argv])
