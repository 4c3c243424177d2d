"""How the NVLink kernels divide SMs and rows: from the sweeps in docs/kernel-notes.md."""

from __future__ import annotations

import functools

from ep_comm._native.header import EP_MIN_CHUNK_TOKENS

DISPATCH_CHUNK_BYTES = 48 * 1024
COMBINE_CHUNK_BYTES = 32 * 1024
# Of a combine's teams, those that begin with pushing; they sum when nothing is left to push, the
# others from the start.
COMBINE_PUSH_PERCENT = 50
MAX_CHUNK_TOKENS = 32
_MAX_UNIT_ROWS = 32
_CHUNKS_TIMES_SMS = 96
_MAX_PLAN_BLOCKS = 64
# Of an asynchronous operation, which is there to run beside computation.
_OVERLAPPED_SMS = 24


def default_sms(available: int, asynchronous: bool) -> int:
    """SMs of an operation that nobody set them for: all, or few of an asynchronous one."""
    return min(_OVERLAPPED_SMS, available) if asynchronous else available


@functools.cache
def split_dispatch(num_sms: int, num_ranks: int) -> tuple[int, int]:
    """SMs that push and SMs that expand. One block an SM: the stages fill its shared memory."""
    push = 0 if num_ranks == 1 else max(1, min(24, num_sms // 3))
    return push, max(1, num_sms - push)


@functools.cache
def split_plan(num_sms: int, expand_sms: int) -> tuple[int, int]:
    """Blocks of the two kernels of a plan: the second one runs beside the push."""
    return min(_MAX_PLAN_BLOCKS, num_sms), min(_MAX_PLAN_BLOCKS, expand_sms)


@functools.cache
def chunk_tokens(chunk_bytes: int, row_bytes: int) -> int:
    """Rows of one flag: about `chunk_bytes`, and the same on every rank."""
    return max(EP_MIN_CHUNK_TOKENS, min(MAX_CHUNK_TOKENS, chunk_bytes // row_bytes))


@functools.cache
def combine_chunks_per_unit(num_sms: int, chunk_rows: int) -> int:
    """Chunks that a team pushes before it raises their flags: with few teams more at a time.

    A chunk itself is the same on all ranks, whatever their SMs.
    """
    rounded = (_CHUNKS_TIMES_SMS + num_sms // 2) // num_sms
    return max(1, min(_MAX_UNIT_ROWS // chunk_rows, rounded))
