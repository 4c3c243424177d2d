"""What ranks tell one another before an operation of the reference backend moves data.

So that a rank that does something else, or nothing, is named before anybody waits for its rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from ep_comm import checks, fp8
from ep_comm.backends.transport import Operation, Transport
from ep_comm.config import EPConfig
from ep_comm.errors import EPMismatchError
from ep_comm.records import OpRecord

# Fields that travel as the place of their value in these.
_NAMED: dict[str, tuple] = {
    "op": ("create", "plan", "dispatch", "combine"),
    "layout": ("rank", "expert"),
    "dtype": (torch.bfloat16, torch.float32, fp8.FP8_DTYPE),
}
_NUM_INTS = 12


def exchange_headers(
    transport: Transport,
    config: EPConfig,
    record: OpRecord,
    rows_to_rank: Iterable[int],
    num_tokens: int = 0,
    **fields: Any,
) -> tuple[int, ...]:
    """Tell every rank what this one is about to do, and check that all do the same.

    Args:
        record: Of the operation; gets the waits and bytes.
        num_tokens: Of a plan, those of this rank; may differ between ranks, as rows may.
        fields: What must be equal on all ranks: integers, a layout, a dtype.

    Returns:
        Rows that each rank announced for this one.

    Raises:
        EPMismatchError: A rank does something else; names both sides.
        EPRoutingError: A rank has more tokens than there is room for; raised on all ranks.
        EPTimeoutError: A rank does nothing.
    """
    operation = Operation(record.op, record.epoch)
    mine = {
        key: _NAMED[key].index(value) if key in _NAMED else value
        for key, value in dict(op=record.op, epoch=record.epoch, **fields).items()
    }
    device = transport.host_device
    send = [
        torch.tensor([len(mine), *mine.values(), rows, num_tokens], dtype=torch.int64).to(device)
        for rows in rows_to_rank
    ]
    # Other operations have other fields: room for the longest, sent at full length.
    send = [F.pad(header, (0, _NUM_INTS - header.numel())) for header in send]
    recv = torch.empty(len(send), _NUM_INTS, dtype=torch.int64, device=device)
    record.wait_s_by_rank = transport.exchange(send, recv.unbind(), operation, "header").wait()
    headers = transport.to_host(recv, operation, "header").tolist()
    for r, (length, *values) in enumerate(headers):
        theirs = dict(zip(mine, values[:length], strict=False))
        if theirs != mine:
            raise _mismatch(transport.rank, mine, r, theirs)
    rows, tokens = zip(*(header[len(mine) + 1 : len(mine) + 3] for header in headers), strict=True)
    checks.check_num_tokens(enumerate(tokens), config)
    return rows


def _mismatch(
    rank: int, mine: dict[str, int], peer: int, theirs: dict[str, int]
) -> EPMismatchError:
    def show(header: dict[str, int], keys: Iterable[str]) -> str:
        return ", ".join(
            f"{key}={_NAMED[key][header[key]] if key in _NAMED else header[key]}" for key in keys
        )

    different = [key for key in mine if mine[key] != theirs.get(key)]
    if mine["op"] != theirs["op"]:  # the other fields mean something else there
        different = ["op", "epoch"]
    return EPMismatchError(
        f"ranks disagree: rank {rank} has {show(mine, different)}; "
        f"rank {peer} has {show(theirs, different)}. Every rank of the group must make the same "
        "calls, in the same order, with the same settings."
    )
