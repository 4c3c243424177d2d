"""What the calls of `ElasticBuffer` do before and behind those of a native buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ep_comm import Buffer as NativeBuffer
from ep_comm.blank import comes_in_order
from ep_comm.checks import checked_tensor
from ep_comm.deep_ep.behind import behind
from ep_comm.deep_ep.elastic_handle import EPHandle
from ep_comm.deep_ep.payload import empty_scales, scales_by_row
from ep_comm.errors import EPArgumentError
from ep_comm.events import EventOverlap
from ep_comm.fp8 import Payload
from ep_comm.handle import DispatchOutput

_REPEATED = ("do_expand", "num_experts", "num_max_tokens_per_rank", "expert_alignment")
_LEFT_OUT = (None,) * len(_REPEATED)
SCALE_GROUP = 4  # FP8 rows by expert: see ep_comm.checks.check_scale_groups


def run_arguments(
    before: object, before_epilogue: object, asynchronous: bool, allocate_on_comm_stream: bool
) -> dict[str, Any]:
    """Return how a native operation is to run that starts after these two events."""
    if before is None and before_epilogue is None and not asynchronous:
        return {}
    first, second = (
        EventOverlap(event) if isinstance(event, torch.cuda.Event) else event
        for event in (before, before_epilogue)
    )
    if isinstance(second, EventOverlap):
        second.order_current_stream()
        second = None
    # V2 orders the communication stream behind the caller's without an event too.
    allocates = bool(allocate_on_comm_stream) and asynchronous
    if allocates and first is None:
        first = NativeBuffer.capture()
    return dict(
        previous_event=first if second is None else second,  # what is no event is refused
        async_finish=asynchronous,
        allocate_on_comm_stream=allocates,
    )


def check_repeated(kept: EPHandle, given: tuple[object, ...]) -> None:
    """Refuse what is passed along with a handle and is not so in it.

    Args:
        kept: The handle.
        given: In the order of `_REPEATED`; None where it was left out.
    """
    if given == _LEFT_OUT:  # as a rule
        return
    for name, value in zip(_REPEATED, given, strict=True):
        if value is not None and value != getattr(kept, name):
            raise EPArgumentError(
                f"{name} is that of the handle, {getattr(kept, name)}, got {value!r}"
            )


def check_stats(stats: Tensor, num_local_experts: int, x: Payload) -> None:
    """Refuse what tokens of experts cannot be counted in: it is [E] int32."""
    device = (x[0] if isinstance(x, tuple) else x).device
    name = "cumulative_local_expert_recv_stats"
    checked_tensor(name, stats, (num_local_experts,), torch.int32, device)


def finish(
    out: DispatchOutput, kept: EPHandle, counted: Tensor | None, column_major: bool
) -> tuple[Payload, EventOverlap]:
    """Return the rows, their scales as V2 has them, and the end of it all; count the tokens."""
    stream, event = kept.buffer.native.comm_stream, out.event
    if counted is not None:
        event = behind(
            event, stream, lambda: counted.add_(kept.native.device_tokens_per_expert), counted
        )
    if not isinstance(out.recv_x, tuple):
        return out.recv_x, event
    rows, scales = out.recv_x
    if not (kept.do_expand or column_major):
        return out.recv_x, event
    given = empty_scales(rows, column_major)
    if event.event is not None and stream is not None:
        given.record_stream(stream)  # it may be freed at any time (allocate_on_comm_stream)
        if comes_in_order():
            stream.wait_stream(torch.cuda.current_stream())

    def arrange() -> None:
        by_row = scales
        if kept.do_expand:
            by_row = scales_by_row(scales, kept.native.device_expert_offsets, len(rows))
        given.copy_(by_row)

    event = behind(event, stream, arrange, rows, scales, given)
    return (rows, given), event
