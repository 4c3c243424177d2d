"""How the NVLink kernels divide SMs and rows: from the sweeps in docs/kernel-notes.md."""

from __future__ import annotations

import functools

from ep_comm._native.header import EP_MIN_CHUNK_TOKENS

DISPATCH_CHUNK_BYTES = 48 * 1024
COMBINE_CHUNK_BYTES = 32 * 1024
# Share of a combine's teams that begin with pushing. They sum when nothing is left to push, the
# others from the start.
COMBINE_PUSH_PERCENT = 50
MAX_CHUNK_TOKENS = 32
_MAX_UNIT_ROWS = 32
_CHUNKS_TIMES_SMS = 96
_MAX_PLAN_BLOCKS = 64
# An asynchronous operation is there to run beside computation.
_OVERLAPPED_SMS = 24


def default_sms(available: int, asynchronous: bool) -> int:
    """Return the SMs of an operation where nobody set them: all, or few for an asynchronous one."""
    return min(_OVERLAPPED_SMS, available) if asynchronous else available


@functools.cache
def split_dispatch(num_sms: int, num_ranks: int) -> tuple[int, int]:
    """Return the SMs that push and those that expand, a block each: stages fill shared memory."""
    push = 0 if num_ranks == 1 else max(1, min(24, num_sms // 3))
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
