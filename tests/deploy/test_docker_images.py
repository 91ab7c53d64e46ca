"""The Dockerfile builds what the project declares: its extras, its packages, its release; and needs no more."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch

import pytest
from docker_files import DOCKERFILE, ROOT, instructions, load, stages

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMAGES = ("gateway", "kvstore", "worker-cpu", "worker-cuda", "setup")


def extras() -> dict[str, list[str]]:
    """What each image installs, by image."""
    found: dict[str, list[str]] = {}
    stage = ""
    for word, rest in instructions():
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2].removesuffix("-dependencies")
        named = re.search(r"requirements\.py ([\w ]+) >", rest)
        if word == "RUN" and named:
            found[stage] = named[1].split()
    return found


def requirements(image: str) -> set[str]:
    """Names of what an image installs beside the project."""
    listed = load("requirements").requirements_of(PROJECT["project"], extras()[image])
    return {re.match(r"[\w.-]+", item)[0].lower() for item in listed}  # type: ignore[index]  # all match


def test_images_install_extras_that_there_are():
    assert set(extras()) == set(IMAGES) - {"setup"}
    for image, names in extras().items():
        assert set(names) <= PROJECT["project"]["optional-dependencies"].keys(), image


def test_gateway_and_store_have_no_torch_and_workers_have():
    assert "torch" not in requirements("gateway") | requirements("kvstore")
    assert "torch" in requirements("worker-cpu") & requirements("worker-cuda")
    assert "redis" in requirements("kvstore") & requirements("gateway")


def test_extras_of_extras_are_followed_and_an_unknown_one_is_refused():
    project = {
        "name": "p",
        "dependencies": ["a"],
        "optional-dependencies": {"x": ["b>=1", "p[y,z]"], "y": ["c"], "z": ["a"]},
    }
    requirements_of = load("requirements").requirements_of
    assert requirements_of(project, ["x"]) == ["a", "b>=1", "c"]
    with pytest.raises(KeyError):
        requirements_of(project, ["w"])


def test_what_the_wheel_is_made_of_is_copied_and_not_ignored():
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert all(any(f"{package}/".startswith(f"{source}/") for source in copied) for package in packages)
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignore[0] == "*"
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    assert admitted == set(copied)
    assert all((ROOT / source).exists() for source in copied)
    assert not any(fnmatch("services/node/spolia_node/probe.py", pattern) for pattern in ignore if pattern != "*")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_10001_and_writes_below_tmp(image: str):
    stage = stages()[image]
    assert stage.user == "10001:10001"
    assert stage.env["HOME"] == "/tmp"
    assert stage.env["SPOLIA_TLS_DIR"] == "/certs"


def test_labels_say_the_release_and_the_base_is_an_argument_with_a_place_for_its_digest():
    text = DOCKERFILE.read_text()
    assert f"ARG VERSION={PROJECT['project']['version']}\n" in text
    assert "FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}} AS python\n" in text
    bases = {rest.rpartition(" AS ")[0] for word, rest in instructions() if word == "FROM"}
    assert {base for base in bases if base not in stages()} == {"${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}}"}


def test_dependencies_are_installed_before_the_code_is_copied():
    """Of each image: the layer of its dependencies, then the project's."""
    layers: dict[str, list[str]] = {}
    for word, rest in instructions():
        if word == "FROM":
            stage = rest.rpartition(" AS ")[2]
        if word == "COPY" and rest.startswith("--from="):
            layers.setdefault(stage, []).append(rest.split()[0].removeprefix("--from="))
    assert layers == {image: [f"{image}-dependencies", "code"] for image in IMAGES if image != "setup"}
