"""Ranks tell one another what comes before an operation of the reference backend moves data.

So a rank that does something else, or nothing, is named before anybody waits for its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ep_comm import checks, fp8
from ep_comm.backends.reference.messages import Exchange, Operation, Transport
from ep_comm.config import EPConfig
from ep_comm.errors import SAME_CALLS, EPMismatchError
from ep_comm.fp8_low_latency import ScaleForm
from ep_comm.telemetry.records import OpRecord

# Fields that travel as the place of their value in these.
_NAMED: dict[str, tuple] = {
    "op": ("plan", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine"),
    "layout": ("rank", "expert"),
    "dtype": (torch.bfloat16, torch.float32, fp8.FP8_DTYPE, torch.float16),
    "scale_form": (None, *ScaleForm),
}
_MAGIC = 0x65705F636F6D6D01  # "ep_comm", and the format of the rest
_NUM_INTS = 16


def exchange_headers(
    transport: Transport,
    config: EPConfig,
    buffer: int,
    record: OpRecord,
    rows_to_rank: Sequence[int],
    num_tokens: int = 0,
    max_rows: int | None = None,
    expected_rows: Sequence[int] | None = None,
    **fields: Any,
) -> tuple[int, ...]:
    """Tell every rank what this one is about to do, and check that all do the same.

    Args:
        transport: Carries the headers.
        config: The buffer's.
        buffer: Number of the buffer on its group.
        record: The operation's; gets the waits.
        rows_to_rank: Rows that this rank will send to each.
        num_tokens: This rank's tokens, in a plan; may differ between ranks, as rows may.
        max_rows: Most rows of a rank for another; None is ``config.max_tokens_per_rank``.
        expected_rows: What each rank has to announce, where that is known: then nothing else will
            do, whatever the most is.
        fields: Values that must be equal on all ranks: integers, and values that have a name.

    Returns:
        Rows that each rank announced for this one.

    Raises:
        EPMismatchError: A rank does something else; names both sides.
        EPTooManyTokensError: A rank has more tokens than there is room for; raised on all.
        EPTimeoutError: A rank does nothing.
    """
    operation = Operation(record.op, record.epoch, buffer)
    mine = {
        key: _NAMED[key].index(value) if key in _NAMED else int(value)
        for key, value in dict(buffer=buffer, op=record.op, epoch=record.epoch, **fields).items()
    }
    device = transport.host_device
    send = torch.zeros(len(rows_to_rank), _NUM_INTS, dtype=torch.int64, device="cpu")
    for header, rows in zip(send, rows_to_rank, strict=True):
        # Other operations have other fields: room for the longest, sent at full length.
        filled = [_MAGIC, rows, num_tokens, len(mine), *mine.values()]
        header[: len(filled)] = torch.tensor(filled, device="cpu")
    # What stays as it is is of masked ranks: as if they said the same, no rows either way.
    recv = send.to(device, copy=True)
    exchange = Exchange(
        transport, send.to(device).split(1), recv, [1] * len(recv), operation, "header"
    )
    record.wait_s_by_rank = exchange.wait()
    headers = transport.to_host(recv, operation, "header").tolist()
    for r, (magic, _, _, length, *values) in enumerate(headers):
        if magic != _MAGIC:
            raise EPMismatchError(
                f"rank {transport.rank} expected the header of a {record.op} from rank {r}, and "
                f"got other data of this group, which begins with {magic:#x}. {SAME_CALLS}"
            )
        theirs = dict(zip(mine, values[:length], strict=False))
        if theirs != mine or length != len(mine):
            raise _mismatch(transport.rank, mine, r, theirs)
    tokens = [header[2] for header in headers]
    if record.op == "plan":
        checks.check_num_tokens(tokens, config)
    rows_from = tuple(header[1] for header in headers)
    max_rows = config.max_tokens_per_rank if max_rows is None else max_rows
    for r, num_rows in enumerate(rows_from):
        if expected_rows is not None:
            if num_rows != expected_rows[r]:
                raise EPMismatchError(
                    f"rank {r} announces {num_rows} rows, and by the routing it has "
                    f"{expected_rows[r]}"
                )
        elif not 0 <= num_rows <= max_rows:
            raise EPMismatchError(f"rank {r} announces {num_rows} rows of {tokens[r]} tokens")
    return rows_from


def _mismatch(
    rank: int, mine: dict[str, int], peer: int, theirs: dict[str, int]
) -> EPMismatchError:
    def show(header: dict[str, int], keys: Iterable[str]) -> str:
        return ", ".join(f"{key}={_shown(key, header.get(key))}" for key in keys)

    different = [key for key in mine if mine[key] != theirs.get(key)]
    for key in ("buffer", "op"):  # the other fields mean something else there
        if key in different:
            different = [key, "epoch"]
            break
    return EPMismatchError(
        f"ranks disagree: rank {rank} has {show(mine, different)}; "
        f"rank {peer} has {show(theirs, different)}. {SAME_CALLS}"
    )


def _shown(key: str, value: int | None) -> object:
    """Return a field's value as it is shown, whatever a peer has sent."""
    names = _NAMED.get(key, ())
    return names[value] if value is not None and 0 <= value < len(names) else value
