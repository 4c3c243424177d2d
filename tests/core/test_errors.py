"""Errors as values: what another process makes of them."""

from __future__ import annotations

import pickle

import pytest

from ep_comm import EPLostRankError, EPOverflowError, EPTimeoutError, EPTooManyTokensError, errors


@pytest.mark.parametrize(
    "error",
    [
        EPOverflowError(num_rows=7, capacity=4),
        EPTooManyTokensError(num_tokens=(3, 9), max_tokens=8),
        EPTimeoutError(
            op="combine", phase="rows", rank=0, late_ranks=(1, 2), epoch=3, timeout_s=2.0
        ),
        EPLostRankError(
            op="plan",
            phase="rows",
            rank=0,
            late_ranks=(1,),
            epoch=3,
            timeout_s=2.0,
            reason="gone",
            origin_ranks=(2,),
        ),  # fmt: skip
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_another_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert again in {again}


def test_messages_say_what_to_do_next():
    late = dict(phase="rows", rank=0, late_ranks=(1,), epoch=3, timeout_s=2.0)
    anew, slow = "build a new one on a group without the missing rank", "if the rank is only slow."
    normal = str(EPTimeoutError(op="combine", **late))
    assert f"no longer usable; {anew}, or raise" in normal and normal.endswith(slow)
    low_latency = EPTimeoutError(op="low_latency_combine", **late)
    mask = "call Buffer.mask_rank on all others of the host to go on without it"
    assert f"no longer usable; {mask}, or {anew}, or raise" in str(low_latency)
    lost = EPLostRankError(op="low_latency_combine", **late, reason="Connection reset by peer")
    assert str(lost) == (
        "low_latency_combine #3: rank 0 lost the connection to rank 1 (phase: rows): Connection "
        f"reset by peer. The buffer is no longer usable; {mask}, or {anew}."
    )
    behind = EPTimeoutError(op="combine", **late, origin_ranks=(2, 4))
    assert "(phase: rows). It began with rank 2, 4, for which others had waited. The" in str(behind)
    assert str(EPTimeoutError(op="combine", **late, origin_ranks=(1,))) == normal
    assert "There is no buffer; build" in str(EPTimeoutError(op="create", **late))


def test_messages_name_the_setting_of_the_tool_in_use(monkeypatch):
    too_many = EPTooManyTokensError(num_tokens=(5, 0), max_tokens=4)
    late = EPTimeoutError(op="plan", phase="rows", rank=0, late_ranks=(1,), epoch=3, timeout_s=2.0)
    monkeypatch.setattr(errors, "_name_of_setting", None)
    for name_of in ("EPConfig({}=...)".format, "--{}".format):
        errors.name_settings(name_of)
        assert f"or raise {name_of('timeout_s')} if" in str(late)
        assert str(too_many).endswith(f"raise {name_of('max_tokens_per_rank')}")
