"""What LINKED recomputes for one model, and whether it may be served: the outcome of `spolia calibrate`, as a file.

    spolia-profile.json in the model's directory, or
    <first 16 hex digits of the fingerprint>.json in a profile directory, which wins

A profile belongs to one model (its fingerprint) and is named for its policy and its content, so an answer that names a
profile names the figures it rests on. A model without a profile is served with `LinkPolicy()` under the name "default".
A file that is there and cannot be used stops a node's start: it is never taken for "no profile".
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from spolia_core.errors import InvalidRequest, NotFound, NotSupported
from spolia_core.field_checks import check_field, is_finite, wrong_field
from spolia_core.link_policy import LinkPolicy

__all__ = [
    "DEFAULT_PROFILE",
    "MANUAL_PROFILE",
    "PROFILE_FILE",
    "PROFILE_VERSION",
    "Bounds",
    "LinkPolicy",
    "PolicyLoss",
    "ReuseProfile",
    "find_profile",
    "load_profile",
    "profile_path",
    "save_profile",
]

PROFILE_VERSION = 1
PROFILE_FILE = "spolia-profile.json"
DEFAULT_PROFILE = "default"
"""`ReuseReport.profile` of a model without a profile."""
MANUAL_PROFILE = "manual"
"""`ReuseReport.profile` where an operator set the link tokens, or the shortest text reused, by hand."""
MAX_PROFILE_BYTES = 16 << 20
MAX_SHOWN = 3
"""Broken bounds that a refusal names."""

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a policy may lose against full recompute, as the operator stated it."""

    max_nll_increase_nats: float = 0.01
    """Mean increase of the negative log-likelihood per answer token, in nats."""
    max_task_loss_points: float = 1.0
    """Loss of task exact match, in points of 100."""

    def __post_init__(self) -> None:
        for name in ("max_nll_increase_nats", "max_task_loss_points"):
            value = getattr(self, name)
            check_field(is_finite(value) and value >= 0, f"bounds.{name}", "a finite number, ≥ 0", value)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """What one policy was measured to lose. `details` are further figures, kept as they were written.

    `breaks` are the figures not shown to keep their bounds, in words, for whoever is refused LINKED: "loss of cut is
    7.5 points, at most 9.1; the bound is 1". A mean within its bound may stand there, where its interval was not.
    """

    policy: str
    """Its name; also of policies that a profile cannot hold, for example "cacheblend:0.16"."""
    nll_increase_nats: float
    """Mean increase of the negative log-likelihood per answer token over full recompute, in nats."""
    task_loss_points: float | None
    """Loss of task exact match against full recompute, in points of 100; None where no task was measured."""
    recomputed_share: float
    """Recomputed tokens of chunks over all tokens of chunks, 0 … 1."""
    details: Mapping[str, Any] = field(default_factory=dict)
    breaks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_field(
            isinstance(self.policy, str) and self.policy != "", "measured.policy", "a policy's name", self.policy
        )
        nll, task, share = self.nll_increase_nats, self.task_loss_points, self.recomputed_share
        check_field(is_finite(nll), "measured.nll_increase_nats", "a finite number", nll)
        check_field(task is None or is_finite(task), "measured.task_loss_points", "a finite number, or null", task)
        check_field(is_finite(share) and 0 <= share <= 1, "measured.recomputed_share", "a number, 0 … 1", share)
        check_field(isinstance(self.details, Mapping), "measured.details", "an object", self.details)
        are_words = isinstance(self.breaks, tuple) and all(isinstance(words, str) for words in self.breaks)
        check_field(are_words, "measured.breaks", "a list of texts", self.breaks)


@dataclass(frozen=True, slots=True)
class ReuseProfile:
    """One model's calibration.

    `fingerprint` is the model's, 64 hex digits. `allows_linked` says whether some measured policy kept the `bounds`:
    then `policy` is the cheapest that did, else the best measured one, used where a request forces LINKED.
    """

    fingerprint: str
    allows_linked: bool
    policy: LinkPolicy
    bounds: Bounds = Bounds()
    measured: tuple[PolicyLoss, ...] = ()

    def __post_init__(self) -> None:
        is_hex = isinstance(self.fingerprint, str) and _FINGERPRINT.fullmatch(self.fingerprint) is not None
        check_field(is_hex, "fingerprint", "64 lower-case hex digits", self.fingerprint)
        check_field(isinstance(self.allows_linked, bool), "allows_linked", "true or false", self.allows_linked)

    @property
    def name(self) -> str:
        """What an answer's `ReuseReport.profile` says: policy and 8 hex digits of the content, "link16-1a2b3c4d"."""
        return _name_of(_content(self), self.policy)

    @property
    def loss(self) -> PolicyLoss | None:
        """What `policy` was measured to lose; None where the file has no figures of it."""
        return next((loss for loss in self.measured if loss.policy == self.policy.name), None)

    def why_forbidden(self) -> str:
        """The figures that broke the bounds, in words; empty where LINKED is allowed."""
        if self.allows_linked:
            return ""
        bounds, loss = self.bounds, self.loss
        allowed = f"bounds {bounds.max_nll_increase_nats:g} nats and {bounds.max_task_loss_points:g} points"
        if loss is None:
            return f"no measured policy kept the {allowed}"
        if loss.breaks:
            more = "" if len(loss.breaks) <= MAX_SHOWN else f"; and {len(loss.breaks) - MAX_SHOWN} more"
            return f"its best policy is {self.policy.name}, whose {'; '.join(loss.breaks[:MAX_SHOWN])}{more}"
        task = "" if loss.task_loss_points is None else f" and {loss.task_loss_points:.3g} points of the tasks"
        return (
            f"its best policy {self.policy.name} loses {loss.nll_increase_nats:.3g} nats per token{task} "
            f"against full recompute; {allowed}"
        )


def save_profile(profile: ReuseProfile, path: Path) -> None:
    """Writes a profile so that a reader sees the old file or the new one, whole. Raises `OSError`.

    A symbolic link stays one: the file it leads to is replaced, whether or not it is there yet.
    """
    path = _followed(path)
    text = json.dumps({"name": profile.name, **_content(profile)}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)  # a node of another user reads it
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename, too, survives a loss of power
    finally:
        os.close(folder)


def load_profile(path: Path) -> ReuseProfile:
    """Reads a profile.

    Raises `NotFound` when there is none, it cannot be read or is no regular file, `NotSupported` for a version this
    release does not know, `InvalidRequest` naming file and field for anything that is not a profile, or was changed
    since it was written.
    """
    try:
        data = _read(path)
    except OSError as error:
        raise NotFound(f"profile {path} cannot be read: {error}", field="profile", actual=str(path)) from error
    try:
        return _parse(data)
    except (InvalidRequest, NotSupported) as error:
        raise type(error)(
            f"profile {path}: {error.message}", field=error.field, limit=error.limit, actual=error.actual
        ) from error


def _followed(path: Path) -> Path:
    """Where symbolic links lead. Raises `OSError` for links that lead to each other."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def _read(path: Path) -> bytes:
    """The bytes of a regular file, up to one more than a profile may have. Raises `OSError` for all others.

    Nothing is waited for: a FIFO that nobody writes to would hold a node's start up for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_PROFILE_BYTES + 1)
    finally:
        os.close(descriptor)


def profile_path(profile_dir: Path, fingerprint: str) -> Path:
    """Where a profile directory keeps the profile of a model."""
    return profile_dir / f"{fingerprint[:16]}.json"


def find_profile(model_dir: Path, profile_dir: Path | None, fingerprint: str) -> ReuseProfile | None:
    """The profile of a model (64 hex digits): from `profile_dir`, else from beside the model, else None.

    Raises as `load_profile` does; `NotFound` for a profile directory that does not exist; `InvalidRequest` for a file
    that is another model's profile.
    """
    paths = [model_dir / PROFILE_FILE]
    if profile_dir is not None:
        if not profile_dir.is_dir():
            raise NotFound(
                f"profile directory {profile_dir} does not exist", field="profile_dir", actual=str(profile_dir)
            )
        paths.insert(0, profile_path(profile_dir, fingerprint))
    path = next((path for path in paths if os.path.lexists(path)), None)
    if path is None:
        return None
    profile = load_profile(path)
    if profile.fingerprint != fingerprint:
        raise InvalidRequest(
            f"profile {path} was measured on another model or compute dtype: its fingerprint is "
            f"{profile.fingerprint[:16]}…, this model's is {fingerprint[:16]}…; run `spolia calibrate` as this node "
            "runs the model, or take the file away",
            field="fingerprint",
            limit=fingerprint,
            actual=profile.fingerprint,
        )
    return profile


def _content(profile: ReuseProfile) -> dict[str, Any]:
    """All that a profile says but its name, which is made of it."""
    return {
        "format_version": PROFILE_VERSION,
        "fingerprint": profile.fingerprint,
        "allows_linked": profile.allows_linked,
        "policy": profile.policy.name,
        "bounds": {
            "max_nll_increase_nats": float(profile.bounds.max_nll_increase_nats),
            "max_task_loss_points": float(profile.bounds.max_task_loss_points),
        },
        "measured": [
            {
                "policy": loss.policy,
                "nll_increase_nats": float(loss.nll_increase_nats),
                "task_loss_points": None if loss.task_loss_points is None else float(loss.task_loss_points),
                "recomputed_share": float(loss.recomputed_share),
                "details": dict(loss.details),
                "breaks": list(loss.breaks),
            }
            for loss in profile.measured
        ],
    }


def _name_of(content: Mapping[str, Any], policy: LinkPolicy) -> str:
    covered = {name: value for name, value in content.items() if name != "name"}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = blake2b(text.encode(), digest_size=4, person=b"spolia.profile").hexdigest()
    return f"{policy.name.replace(':', '').replace('+', '-')}-{digest}"


def _parse(data: bytes) -> ReuseProfile:
    check_field(len(data) <= MAX_PROFILE_BYTES, "size", f"at most {MAX_PROFILE_BYTES} bytes", "more")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise wrong_field("content", "JSON", str(error)) from error
    check_field(isinstance(content, dict), "content", "an object", content)
    version = content.get("format_version")
    if type(version) is not int or version != PROFILE_VERSION:
        raise NotSupported(
            f"format_version {version!r} is unknown; this release reads {PROFILE_VERSION}",
            field="format_version",
            limit=str(PROFILE_VERSION),
            actual=repr(version),
        )
    names = {"name", "format_version", "fingerprint", "allows_linked", "policy", "bounds", "measured"}
    _check_names(content, names, "")
    bounds, measured, policy = content["bounds"], content["measured"], content["policy"]
    _check_names(bounds, {"max_nll_increase_nats", "max_task_loss_points"}, "bounds.")
    check_field(isinstance(measured, list), "measured", "a list", measured)
    for loss in measured:
        names = {"policy", "nll_increase_nats", "task_loss_points", "recomputed_share", "details", "breaks"}
        _check_names(loss, names, "measured.")
    check_field(isinstance(policy, str), "policy", "a policy's name", policy)
    profile = ReuseProfile(
        fingerprint=content["fingerprint"],
        allows_linked=content["allows_linked"],
        policy=LinkPolicy.parse(policy),
        bounds=Bounds(**bounds),
        measured=tuple(PolicyLoss(**{**loss, "breaks": _tuple_of(loss["breaks"])}) for loss in measured),
    )
    try:
        name = _name_of(content, profile.policy)
    except (ValueError, RecursionError) as error:  # all else was checked field by field
        raise wrong_field("measured.details", "finite numbers, not nested too deep", str(error)) from error
    check_field(
        content["name"] == name, "name", f"{name}, which its content makes it: it was changed by hand", content["name"]
    )
    return profile


def _tuple_of(value: Any) -> Any:
    """A list as a tuple; whatever else it is, for its check to name."""
    return tuple(value) if isinstance(value, list) else value


def _check_names(value: object, names: set[str], where: str) -> None:
    """An object with exactly these fields: a misspelt one is not passed over."""
    check_field(isinstance(value, dict), where.rstrip("."), "an object", value)
    assert isinstance(value, dict)
    for name in sorted(names - value.keys()):
        raise wrong_field(where + name, "given", "nothing")
    for name in sorted(value.keys() - names):
        raise wrong_field(where + name, "absent: format 1 has no such field", value[name])
