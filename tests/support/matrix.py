"""Matrices of cases of which every run tests a few, and ``pytest -m e2e`` the others."""

from __future__ import annotations

from collections.abc import Iterable

import pytest


def few_of(cases: Iterable[object], *kept: object) -> list:
    """Return all `cases` for a parametrization; those that are not `kept` are marked e2e."""
    cases = list(cases)
    assert set(kept) <= set(cases), f"no such case: {set(kept) - set(cases)}"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.e2e) for case in cases]
