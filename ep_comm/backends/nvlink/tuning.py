"""How the NVLink kernels divide SMs and rows: from the sweeps in docs/kernel-notes.md."""

from __future__ import annotations

import functools

from ep_comm._native.header import EP_MIN_CHUNK_TOKENS
from ep_comm.routing.types import RowLayout

DISPATCH_CHUNK_BYTES = 48 * 1024
COMBINE_CHUNK_BYTES = 32 * 1024
# Share of a combine's teams that begin with pushing. They sum when nothing is left to push, the
# others from the start.
COMBINE_PUSH_PERCENT = 50
MAX_CHUNK_TOKENS = 32
_MAX_UNIT_ROWS = 32
_CHUNKS_TIMES_SMS = 96
_MAX_PLAN_BLOCKS = 64
# GB/s of one SM: rows pushed; rows copied once; output rows stored, of rows read for several.
_PUSHED_BY_SM, _COPIED_BY_SM, _STORED_BY_SM = 38, 45, 54
_FILLING_LINKS = 9  # SMs that push as much as links carry: more of them only take from the rest
_MANY_SMS = 64
_MOST_PUSHING = 24
# Of an operation beside computation. Where copy engines are its wire it is bound by memory alone.
_OVERLAPPED_SMS, _OVERLAPPED_SMS_BY_COPY = 24, 32


@functools.cache
def default_sms(available: int, overlapped: bool, by_copy: bool = False) -> int:
    """Return the SMs of an operation where nobody set them: all, or few beside computation."""
    few = _OVERLAPPED_SMS_BY_COPY if by_copy else _OVERLAPPED_SMS
    return min(few, available) if overlapped else available


@functools.cache
def split_dispatch(
    num_sms: int, num_ranks: int, layout: RowLayout, num_topk: int
) -> tuple[int, int]:
    """Return the SMs that push and those that expand, a block each: stages fill shared memory.

    Few are divided so that both halves end at once, experts being selected evenly.
    """
    if num_ranks == 1:
        return 0, max(1, num_sms)
    if num_sms >= _MANY_SMS:
        push = min(_MOST_PUSHING, num_sms // 3)
        return push, num_sms - push
    # Of one token, in rows: the ranks that it goes to, and what becomes of it there.
    ranks = num_ranks * (1 - (1 - 1 / num_ranks) ** num_topk)
    pushed = ranks * (num_ranks - 1) / num_ranks / _PUSHED_BY_SM
    expanded = ranks / _COPIED_BY_SM if layout == "rank" else num_topk / _STORED_BY_SM
    most = max(1, min(num_sms - 1, _FILLING_LINKS))
    push = min(range(1, most + 1), key=lambda n: max(pushed / n, expanded / max(1, num_sms - n)))
    return push, max(1, num_sms - push)


@functools.cache
def split_plan(num_sms: int, expand_sms: int) -> tuple[int, int]:
    """Return the blocks of the two kernels of a plan: the second one runs beside the push."""
    return min(_MAX_PLAN_BLOCKS, num_sms), min(_MAX_PLAN_BLOCKS, expand_sms)


@functools.cache
def chunk_tokens(chunk_bytes: int, row_bytes: int) -> int:
    """Return the rows of one flag: about `chunk_bytes`, and the same on every rank."""
    return max(EP_MIN_CHUNK_TOKENS, min(MAX_CHUNK_TOKENS, chunk_bytes // row_bytes))


@functools.cache
def combine_chunks_per_unit(num_sms: int, chunk_rows: int) -> int:
    """Return the chunks that a team pushes before it raises their flags: more where teams are few.

    A chunk itself is the same on all ranks, whatever their SMs.
    """
    rounded = (_CHUNKS_TIMES_SMS + num_sms // 2) // num_sms
    return max(1, min(_MAX_UNIT_ROWS // chunk_rows, rounded))
