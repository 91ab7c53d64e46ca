"""Laws of profiles: what is written is what is read, and nothing else is ever read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spolia_core.errors import InvalidRequest, NotFound, NotSupported, SpoliaError
from spolia_core.link_policy import LinkPolicy
from spolia_core.profile import (
    PROFILE_FILE,
    Bounds,
    PolicyLoss,
    ReuseProfile,
    find_profile,
    load_profile,
    profile_path,
    save_profile,
)

LAWFUL = settings(derandomize=True, deadline=None, max_examples=60, database=None)
FINGERPRINT = "0123456789abcdef" * 4
OTHER = "f" * 64
LOSS = PolicyLoss("sinks:4+link:8", 0.031, 2.5, 0.125, {"kl_p99": 0.5, "tasks": {"cut": [0.9, 0.8]}})
PROFILE = ReuseProfile(FINGERPRINT, False, LinkPolicy(8, 4), Bounds(0.01, 1.0), (LOSS,))

numbers = st.floats(allow_nan=False, allow_infinity=False)
policies = st.builds(LinkPolicy, st.integers(0, 1 << 20), st.integers(0, 1 << 10))
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
losses = st.builds(
    PolicyLoss,
    policy=st.text(min_size=1),
    nll_increase_nats=numbers,
    task_loss_points=st.none() | numbers,
    recomputed_share=st.floats(0, 1),
    details=st.dictionaries(st.text(), json_values, max_size=3),
    breaks=st.lists(st.text(), max_size=3).map(tuple),
)
profiles = st.builds(
    ReuseProfile,
    fingerprint=st.text("0123456789abcdef", min_size=64, max_size=64),
    allows_linked=st.booleans(),
    policy=policies,
    bounds=st.builds(Bounds, st.floats(0, 1e6), st.floats(0, 1e6)),
    measured=st.lists(losses, max_size=3).map(tuple),
)


def written(folder: Path, profile: ReuseProfile = PROFILE) -> Path:
    path = folder / PROFILE_FILE
    save_profile(profile, path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def refusal(path: Path) -> SpoliaError:
    with pytest.raises(SpoliaError) as caught:
        load_profile(path)
    assert str(path) in caught.value.message
    return caught.value


@LAWFUL
@given(profiles)
@example(PROFILE)
def test_what_is_written_is_read(profile: ReuseProfile) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), profile)
        read = load_profile(path)
        assert read == profile
        assert read.name == profile.name
        assert os.listdir(folder) == [PROFILE_FILE], "no temporary file is left"


@LAWFUL
@given(profiles, profiles)
def test_profiles_that_differ_have_other_names(one: ReuseProfile, other: ReuseProfile) -> None:
    assert one == other or one.name != other.name


def test_a_name_says_the_policy_and_the_content() -> None:
    assert PROFILE.name.startswith("sinks4-link8-")
    assert len(PROFILE.name.rpartition("-")[2]) == 8
    assert replace(PROFILE, policy=LinkPolicy(0, 0)).name.startswith("naive-")
    assert replace(PROFILE, measured=()).name != PROFILE.name
    assert replace(PROFILE, policy=LinkPolicy()).name.startswith("link16-")


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (LinkPolicy(), "link:16"),
        (LinkPolicy(0, 0), "naive"),
        (LinkPolicy(0, 4), "sinks:4"),
        (LinkPolicy(8, 4), "sinks:4+link:8"),
    ],
)
def test_policies_have_these_names(policy: LinkPolicy, name: str) -> None:
    assert policy.name == name
    assert LinkPolicy.parse(name) == policy


@LAWFUL
@given(policies)
def test_a_policy_is_known_by_its_name(policy: LinkPolicy) -> None:
    assert LinkPolicy.parse(policy.name) == policy


@pytest.mark.parametrize(
    "name",
    [
        "",
        "link",
        "link:",
        "link:-1",
        "link:1.5",
        "link:٣",
        "link:+8",
        "Link:8",
        "link:1048577",
        "link:99999999999",
        "sinks:0",
        "sinks:4+",
        "sinks:4link:8",
        "sinks:1025",
        "link:8+sinks:4",
        "full",
        "cacheblend:0.16",
        "link:8_0",
    ],
)
def test_what_is_no_policy_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LinkPolicy.parse(name)
    assert caught.value.field in ("policy", "num_link_tokens", "num_sink_tokens")


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0, [1]])
def test_an_unknown_version_is_refused_before_all_else(version: object, tmp_path: Path) -> None:
    path = rewritten(written(tmp_path), lambda content: content.update(format_version=version, fingerprint=7))
    error = refusal(path)
    assert isinstance(error, NotSupported)
    assert error.field == "format_version"


def _at(content: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    *folders, name = where.split(".")
    for folder in folders:
        found = content[folder]
        content = found[0] if isinstance(found, list) else found
    return content, name


FIELDS: dict[str, list[object]] = {
    "name": [None, 7, "link16-00000000"],
    "fingerprint": [None, 7, "", "0" * 63, "G" * 64, FINGERPRINT.upper()],
    "allows_linked": [None, 0, "true"],
    "policy": [None, 8, "", "full", ["link:8"]],
    "bounds": [None, 7, []],
    "bounds.max_nll_increase_nats": [None, "0.01", -0.1, True],
    "bounds.max_task_loss_points": [None, "1", -1, {}],
    "measured": [None, {}, "none"],
    "measured.policy": [None, "", 4],
    "measured.nll_increase_nats": [None, "0", False, 10**400],
    "measured.task_loss_points": ["0", True],
    "measured.recomputed_share": [None, -0.1, 1.1, "all"],
    "measured.details": [None, [], "x"],
    "measured.breaks": [None, {}, "x", [1]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_a_wrong_value_is_named_with_its_file(field: str, value: object, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        holder, name = _at(content, field)
        holder[name] = value

    error = refusal(rewritten(written(tmp_path), change))
    assert isinstance(error, InvalidRequest)
    assert error.field == field
    assert field in error.message


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_an_absent_or_misspelt_field_is_named(field: str, tmp_path: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        holder, name = _at(content, field)
        del holder[name]

    assert refusal(rewritten(written(tmp_path), drop)).field == field

    def misspell(content: dict[str, Any]) -> None:
        holder, name = _at(content, field)
        holder[name + "s"] = holder[name]

    assert refusal(rewritten(written(tmp_path), misspell)).field == field + "s"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(allows_linked=True),
        lambda content: content.update(policy="link:9"),
        lambda content: content["bounds"].update(max_task_loss_points=3),
        lambda content: content["measured"][0]["details"].update(kl_p99=0.4),
        lambda content: content["measured"].clear(),
    ],
)
def test_a_file_changed_by_hand_is_not_what_its_name_says(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    error = refusal(rewritten(written(tmp_path), change))
    assert isinstance(error, InvalidRequest)
    assert error.field == "name"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format_version": 1}',
        b"NaN",
        b" " * (16 << 20) + b"{}",
    ],
)
def test_what_is_no_profile_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / PROFILE_FILE
    path.write_bytes(data)
    assert isinstance(refusal(path), InvalidRequest | NotSupported)


def test_numbers_that_are_none_are_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        replace(LOSS, nll_increase_nats=float("nan"))
    with pytest.raises(ValueError, match="JSON compliant"):
        save_profile(replace(PROFILE, measured=(replace(LOSS, details={"kl": float("nan")}),)), tmp_path / PROFILE_FILE)
    path = written(tmp_path)
    path.write_text(path.read_text().replace("0.031", "Infinity"))
    assert refusal(path).field == "measured.nll_increase_nats"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "[-1e999]"])
def test_details_that_are_no_finite_numbers_are_refused_with_their_file(number: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace('"kl_p99": 0.5', f'"kl_p99": {number}'))
    error = refusal(path)
    assert isinstance(error, InvalidRequest)
    assert error.field == "measured.details"


@pytest.mark.parametrize("depth", [100, 900, 990, 2_000, 9_000, 60_000])
def test_details_nested_to_any_depth_are_read_or_refused(depth: int, tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace('"kl_p99": 0.5', '"kl_p99": ' + "[" * depth + "]" * depth))
    assert refusal(path).field in ("measured.details", "content", "name")


def test_a_link_to_a_profile_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    folder, path = tmp_path / "kept", tmp_path / PROFILE_FILE
    folder.mkdir()
    for target in (folder / "there.json", folder / "not-yet.json"):
        path.unlink(missing_ok=True)
        path.symlink_to(target.relative_to(tmp_path))
        if target.name == "there.json":
            save_profile(replace(PROFILE, allows_linked=True), target)
        save_profile(PROFILE, path)
        assert path.is_symlink()
        assert not target.is_symlink()
        assert load_profile(path) == load_profile(target) == PROFILE
    assert sorted(os.listdir(folder)) == ["not-yet.json", "there.json"], "no temporary file is left"


def test_links_that_lead_to_each_other_are_left_alone(tmp_path: Path) -> None:
    path, other = tmp_path / PROFILE_FILE, tmp_path / "other"
    path.symlink_to(other)
    other.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        save_profile(PROFILE, path)
    assert path.is_symlink()
    assert other.is_symlink()
    assert isinstance(refusal(path), NotFound)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        save_profile(replace(PROFILE, allows_linked=True), path)
    assert load_profile(path) == PROFILE
    assert os.listdir(tmp_path) == [PROFILE_FILE]


def test_the_profile_directory_wins_over_the_models(tmp_path: Path) -> None:
    model, profiles_dir = tmp_path / "model", tmp_path / "profiles"
    model.mkdir()
    profiles_dir.mkdir()
    assert find_profile(model, None, FINGERPRINT) is None
    assert find_profile(model, profiles_dir, FINGERPRINT) is None
    written(model)
    assert find_profile(model, profiles_dir, FINGERPRINT) == PROFILE
    newer = replace(PROFILE, allows_linked=True)
    save_profile(newer, profile_path(profiles_dir, FINGERPRINT))
    assert find_profile(model, profiles_dir, FINGERPRINT) == newer
    assert find_profile(model, None, FINGERPRINT) == PROFILE


@pytest.mark.parametrize("in_directory", [False, True])
def test_another_models_profile_is_refused_not_passed_over(in_directory: bool, tmp_path: Path) -> None:
    path = profile_path(tmp_path, FINGERPRINT) if in_directory else tmp_path / PROFILE_FILE
    save_profile(replace(PROFILE, fingerprint=OTHER), path)
    with pytest.raises(InvalidRequest, match="another model") as caught:
        find_profile(tmp_path, tmp_path if in_directory else None, FINGERPRINT)
    assert caught.value.field == "fingerprint"
    assert str(path) in caught.value.message


def test_a_file_that_cannot_be_read_is_not_no_profile(tmp_path: Path) -> None:
    (tmp_path / PROFILE_FILE).symlink_to(tmp_path / "gone")
    with pytest.raises(NotFound, match=PROFILE_FILE):
        find_profile(tmp_path, None, FINGERPRINT)
    (tmp_path / PROFILE_FILE).unlink()
    (tmp_path / PROFILE_FILE).mkdir()
    with pytest.raises(NotFound, match=PROFILE_FILE):
        find_profile(tmp_path, None, FINGERPRINT)
    with pytest.raises(NotFound, match="nowhere") as caught:
        find_profile(tmp_path, tmp_path / "nowhere", FINGERPRINT)
    assert caught.value.field == "profile_dir"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("behind_a_link", [False, True])
def test_what_is_no_regular_file_is_refused_without_waiting(behind_a_link: bool, tmp_path: Path) -> None:
    path = tmp_path / PROFILE_FILE
    fifo = tmp_path / "fifo" if behind_a_link else path
    os.mkfifo(fifo)
    if behind_a_link:
        path.symlink_to(fifo)
    with pytest.raises(NotFound, match="no regular file") as caught:
        find_profile(tmp_path, None, FINGERPRINT)
    assert str(path) in caught.value.message


def test_a_refusal_has_the_figures_that_broke_the_bounds() -> None:
    why = PROFILE.why_forbidden()
    assert all(figure in why for figure in ("sinks:4+link:8", "0.031 nats", "2.5 points", "0.01 nats", "1 points"))
    assert (
        "points of the tasks" not in replace(PROFILE, measured=(replace(LOSS, task_loss_points=None),)).why_forbidden()
    )
    assert "no measured policy" in replace(PROFILE, measured=()).why_forbidden()
    assert replace(PROFILE, allows_linked=True).why_forbidden() == ""
    many = replace(LOSS, breaks=tuple(f"loss of task {n} is 7.5 points; the bound is 1" for n in range(9)))
    why = replace(PROFILE, measured=(many,)).why_forbidden()
    assert all(words in why for words in ("sinks:4+link:8", *many.breaks[:3], "and 6 more"))
