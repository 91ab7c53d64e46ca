"""What has to be set before any test imports anything, and which files' tests begin."""

from __future__ import annotations

import os

import pytest

# Torch reads it when it is loaded. Processes of a run share the cores: threads that wait must not spin meanwhile.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, whoever imports it first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first: what is left at the end is short, and every process has something to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
