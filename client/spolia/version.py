"""Which release this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

UNINSTALLED_VERSION = "0+uninstalled"


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, without importing it; `UNINSTALLED_VERSION` where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return UNINSTALLED_VERSION


__version__ = installed_version("spolia")
