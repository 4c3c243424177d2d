"""What a low-latency operation gives: results, the handle for combine, the hook that receives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ep_comm.backends.requests import LowLatencySizes, Pending
from ep_comm.errors import EPArgumentError, EPStateError
from ep_comm.events import EventOverlap
from ep_comm.fp8 import Payload
from ep_comm.handle import Handle
from ep_comm.session import Session

MOST_OUT = 2  # results of a kind: staging memory has two halves


class Hook:
    """Receives what one operation has sent, on the current stream. Called once, without arguments.

    Raises:
        EPStateError: It was called before, or the buffer is unusable.
        EPTimeoutError: A rank did not send within ``config.timeout_s``.
    """

    __slots__ = ("_kind", "_receive", "_session", "number")

    def __init__(
        self, session: Session, kind: str, number: int, receive: Callable[[], object]
    ) -> None:
        self._session = session
        self._receive: Callable[[], object] | None = receive
        self._kind = kind
        self.number = number

    @property
    def name(self) -> str:
        """Of the operation, for messages."""
        return f"{self._kind} #{self.number}"

    @property
    def was_called(self) -> bool:
        """Whether it has received."""
        return self._receive is None

    def __call__(self) -> None:
        """Receive."""
        operation, receive = self._session.operation(), self._receive
        if receive is None:
            raise EPStateError(f"the hook of {self.name} was called before: call it once")
        with operation:
            receive()
        self._receive = None

    def __repr__(self) -> str:
        return f"Hook({self.name}, {'called' if self.was_called else 'not called yet'})"


class HooksOut:
    """The operations of one kind on one buffer: how many there were, and who is still to receive.

    Args:
        kind: "low_latency_dispatch" or "low_latency_combine".
        num_operations: The number that they count on from.
    """

    def __init__(self, kind: str, num_operations: int = 0) -> None:
        self.kind = kind
        self.num_operations = num_operations
        # The last one of each half of the memory, which operations take in turns.
        self._hooks: list[Hook | None] = [None] * MOST_OUT

    def check_room(self) -> None:
        """Raise `EPStateError` where there is no room for another operation; name the hook."""
        number = self.num_operations + 1
        hook = self._hooks[number % MOST_OUT]
        if hook is not None and not hook.was_called:
            raise EPStateError(
                f"{self.kind} #{number}: the hook of {hook.name} was not called yet, whose memory "
                f"it would use: results of the last {MOST_OUT} may be out at once"
            )

    def add(self, session: Session, pending: Pending, is_split: bool) -> Hook | None:
        """Count an operation that was started; return its hook where it is to have one."""
        self.num_operations = number = self.num_operations + 1
        hook = Hook(session, self.kind, number, pending.wait) if is_split else None
        self._hooks[number % MOST_OUT] = hook
        return hook


@dataclass(eq=False)
class LowLatencyHandle(Handle):
    """What combine needs of one low-latency dispatch, for any number of combines in turn.

    T tokens of this rank, M = `max_tokens`, R ranks, E experts on each.

    Attributes:
        session: Of the buffer that made it, which is the only one that accepts it.
        number: Of the dispatch among the low-latency ones of the buffer, from 1.
        topk_idx: [T, K] as it was dispatched.
        topk_weights: [T, K] FP32 that travelled with the rows; None where none did.
        sizes: Of the dispatch.
        ints: `recv_src_info`, and behind it what the backend keeps for the combine.
        pending: What the backend started.
        hook: That of the dispatch; None where it has none.
        combine_buffer: See `Buffer.get_next_low_latency_combine_buffer`.
        combine_hook: That of the last combine; None where it has none.
    """

    session: Session = field(repr=False)
    number: int
    topk_idx: Tensor = field(repr=False)
    topk_weights: Tensor | None = field(repr=False)
    sizes: LowLatencySizes
    ints: Tensor = field(repr=False)
    pending: Pending[Any] = field(repr=False)
    hook: Hook | None = field(default=None, repr=False)
    combine_buffer: Tensor | None = field(default=None, repr=False)
    combine_hook: Hook | None = field(default=None, repr=False)

    @property
    def max_tokens(self) -> int:
        """M, ``num_max_dispatch_tokens_per_rank`` of the dispatch."""
        return self.sizes.max_tokens

    @property
    def recv_src_info(self) -> Tensor:
        """[E, R M] int32, source rank x M + token of each received row.

        Unspecified behind the rows that came. Complete when the rows are.
        """
        num_experts, num_rows, _ = self.sizes.recv_shape
        return self.ints[: num_experts * num_rows].view(num_experts, num_rows)


def checked_handle(handle: object, session: Session) -> LowLatencyHandle:
    """Return `handle`, which a combine of the session's buffer may take now.

    Raises:
        EPArgumentError: It is none, or another buffer's.
        EPStateError: Its rows were not received yet, or the sums of the combine before; or ranks
            were masked since it was made.
    """
    if not isinstance(handle, LowLatencyHandle):
        raise EPArgumentError(f"handle must be a LowLatencyHandle, got {type(handle).__name__}")
    session.check_own(handle.session)
    if handle.combine_hook is not None and not handle.combine_hook.was_called:
        raise EPStateError(
            f"the hook of {handle.combine_hook.name} was not called: it combines the same dispatch"
        )
    if handle.hook is not None and not handle.hook.was_called:
        raise EPStateError(
            f"the hook of {handle.hook.name} was not called: its rows are not received yet"
        )
    return handle


class LowLatencyDispatchOutput(NamedTuple):
    """Result of `Buffer.low_latency_dispatch`, in the order of DeepEP's return tuple.

    H = hidden, M = ``num_max_dispatch_tokens_per_rank``, R ranks, E experts on each. Complete after
    `event` or `hook`, where they were asked for.

    Attributes:
        recv_x: BF16 [E, R M, H]; or (``float8_e4m3fn`` [E, R M, H], scales), the scales FP32
            [E, R M, H / 128], or int32 [E, R M, H / 512] where they are UE8M0. Rows of expert e
            behind the first ``recv_count[e]`` are unspecified memory, and so are their scales.
            Scales are column-major in the last two dimensions; the distance of two columns is R M
            rounded up to a multiple of 4, as TMA needs it.
        recv_count: [E] int32 on the device, rows of each expert.
        handle: Pass it to `Buffer.low_latency_combine`.
        event: Completion of the operation, with ``async_finish``.
        hook: Receives; None without ``return_recv_hook``.
    """

    recv_x: Payload
    recv_count: Tensor
    handle: LowLatencyHandle
    event: EventOverlap
    hook: Hook | None


class LowLatencyCombineOutput(NamedTuple):
    """Result of `Buffer.low_latency_combine`.

    Attributes:
        combined_x: BF16 [T, H].
        event: Completion of the operation, with ``async_finish``.
        hook: Receives; None without ``return_recv_hook``.
    """

    combined_x: Tensor
    event: EventOverlap
    hook: Hook | None
