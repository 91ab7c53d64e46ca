"""The tiny model, and a world for each test that asks."""

from __future__ import annotations

from worker_fixtures import model, world

__all__ = ["model", "world"]
