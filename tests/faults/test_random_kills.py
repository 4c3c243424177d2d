"""Cases that nobody chose: no hang, no orphan, and the right name, whenever a rank is killed."""

from __future__ import annotations

import pytest
from random_kills import try_kill


def check(seeds: range) -> None:
    problems = {kill: problem for kill, problem, _ in map(try_kill, seeds) if problem}
    assert not problems


def test_a_few_random_kills():
    check(range(1000, 1004))


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_two_hundred_random_kills():
    check(range(200))
