"""The tiny model, a world for each test that asks, and an engine's thread alone."""

from __future__ import annotations

from worker_fixtures import model, thread, world

__all__ = ["model", "thread", "world"]
