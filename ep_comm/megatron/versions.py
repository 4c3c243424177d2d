"""The versions of Megatron-Core that ep_comm works with. pyproject.toml asks for the same range."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

SUPPORTED = ">=0.16.1,<0.21"


def is_supported(version: str) -> bool:
    """Return whether `version`, such as "0.20.0rc0" or "0.19.1+git", is in the range."""
    return SpecifierSet(SUPPORTED).contains(version, prereleases=True)
