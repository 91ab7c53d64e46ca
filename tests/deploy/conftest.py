"""Each installation is built once; and what a user makes for one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from k8s_secrets import folder
from k8s_world import INSTALLATIONS, Manifests, build, manifests_in, write_installation

__all__ = ["folder"]  # a fixture


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """YAML by installation."""
    texts = {}
    for name in INSTALLATIONS:
        place = tmp_path_factory.mktemp("installation").resolve()
        write_installation(name, place)
        texts[name] = build(place)
    return texts


@pytest.fixture(params=INSTALLATIONS)
def manifests(request: pytest.FixtureRequest, built: Mapping[str, str]) -> Manifests:
    """Every installation in turn."""
    return manifests_in(built[request.param])


@pytest.fixture
def production(built: Mapping[str, str]) -> Manifests:
    return manifests_in(built["production"])


@pytest.fixture
def folder_of_secrets(tmp_path: Path) -> Path:
    place = tmp_path / "secrets"
    place.mkdir()
    return place
