"""How the NVLink kernels divide SMs and rows: from the sweeps in docs/performance.md."""

from __future__ import annotations

DISPATCH_CHUNK_BYTES = 48 * 1024
COMBINE_CHUNK_BYTES = 32 * 1024
_MAX_UNIT_ROWS = 32
_FEW_SMS_UNIT_BYTES = 256 * 1024


def split_dispatch(num_sms: int, num_ranks: int) -> tuple[int, int]:
    """SMs that push and SMs that expand. One block an SM: the stages fill its shared memory."""
    push = 0 if num_ranks == 1 else max(1, min(24, num_sms // 3))
    return push, max(1, num_sms - push)


def split_combine(num_sms: int) -> tuple[int, int]:
    """SMs that push partial rows and SMs that sum them."""
    push = max(1, num_sms // 2)
    return push, max(1, num_sms - push)


def combine_chunks_per_unit(num_sms: int, chunk_rows: int, row_bytes: int) -> int:
    """Chunks whose flags a push block raises at once. That holds it up: with few blocks, seldom.

    A chunk itself is the same on all ranks, whatever their SMs.
    """
    if num_sms >= 64:
        return 1
    return max(1, min(_MAX_UNIT_ROWS, _FEW_SMS_UNIT_BYTES // row_bytes) // chunk_rows)
