"""What a backend does differently where copy engines are its wire."""

from __future__ import annotations

from collections.abc import Sequence

from ep_comm._native import header
from ep_comm.backends.nvlink.args import KernelArgs
from ep_comm.backends.nvlink.copy_engine import CombineCopyEngine, DispatchCopyEngine
from ep_comm.backends.nvlink.resources import Resources


class Copies:
    """The copies of a buffer's operations.

    Args:
        resources: The backend's.
        args: Those of the kernels.

    Attributes:
        dispatch, combine: The copy engine of each kind of operation.
    """

    def __init__(self, resources: Resources, args: KernelArgs) -> None:
        self._streams = resources.streams
        self.dispatch = DispatchCopyEngine(resources, args.dispatch.peers)
        self.combine = CombineCopyEngine(resources, args.combine.peers)

    @property
    def num_bytes(self) -> int:
        """Bytes of the local buffers of a combine."""
        return self.combine.num_bytes

    def delay(self, up_to_ns: int) -> None:
        """Delay waits and signals of later operations at random, for tests."""
        for args in (*self.dispatch.args, *self.combine.args):
            args.peers.delay_ns = up_to_ns

    def restart(self) -> None:
        """Count operations anew: all flags are zero."""
        self.dispatch.restart()
        self.combine.restart()

    def push_rows_ahead(self, args: header.DispatchArgs, num_tokens: int, record: int) -> None:
        """Begin a dispatch with its rows, behind the last dispatch and the caller's stream."""
        self._streams.order_behind_last(header.EP_OP_DISPATCH, self.dispatch.stream)
        self.dispatch.begin(self._streams.current, record, begins=True)
        self.dispatch.push_rows(args, num_tokens)

    def push_planned(
        self, args: header.DispatchArgs, num_tokens: int, made_rows: bool, made_weights: bool
    ) -> None:
        """Push what a new dispatch sends, or what is left of it.

        Args:
            args: Says where it is.
            num_tokens: Rows.
            made_rows: The caller's stream makes the rows, and what else is sent, behind the plan.
            made_weights: It makes the weights.
        """
        current = self._streams.current
        if made_rows:
            self._streams.wait(self.dispatch.stream, current)
        self.dispatch.push(args, num_tokens, current if made_weights and not made_rows else None)

    def repeat(
        self,
        args: header.DispatchArgs,
        num_tokens: int,
        num_sms: int,
        stream: int,
        is_ahead: bool,
    ) -> None:
        """Launch a dispatch whose routing is known, or what is left of it where it `is_ahead`."""
        if not is_ahead:
            self.dispatch.begin(stream, args.peers.record, begins=True)
        self.dispatch.push(args, num_tokens, self._streams.current if is_ahead else None)
        self.dispatch.expand(args, num_sms, stream)

    def push_alone(self, args: header.DispatchArgs, num_tokens: int, stream: int) -> None:
        """Push rows that nobody expands, with gate and flags: what copies alone cost."""
        self.dispatch.begin(stream, args.peers.record, begins=True)
        self.dispatch.push(args, num_tokens, None)
        self.dispatch.end(args, stream)

    def sum(self, args: header.CombineArgs, received: Sequence[int] | None, stream: int) -> None:
        """Launch a combine; see `CombineCopyEngine.combine`."""
        self.combine.begin(stream, args.peers.record, begins=True)
        self.combine.combine(args, received, stream)
