"""Errors as values: what another process makes of them."""

from __future__ import annotations

import pickle

import pytest

from ep_comm import EPOverflowError, EPTimeoutError, EPTooManyTokensError


@pytest.mark.parametrize(
    "error",
    [
        EPOverflowError(num_rows=7, capacity=4),
        EPTooManyTokensError(num_tokens=(3, 9), max_tokens=8),
        EPTimeoutError(
            op="combine", phase="rows", rank=0, late_ranks=(1, 2), epoch=3, timeout_s=2.0
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_another_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert again in {again}
