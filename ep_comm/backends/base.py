"""The protocol of a backend: the one interface behind which tokens move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ep_comm.backends.requests import (
    Combined,
    CombineRequest,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    Pending,
    PlanRequest,
    Received,
)
from ep_comm.config import EPConfig
from ep_comm.job.meeting import Meeting
from ep_comm.routing.types import Routing, RowLayout
from ep_comm.telemetry.records import Records
from ep_comm.telemetry.watch import Wait
from ep_comm.topology import Spot

if TYPE_CHECKING:
    from typing_extensions import Self

NEEDS_COPY_ENGINES = "begin_dispatch needs EPConfig(wire='copy-engine')"


class LowLatencyBackend(Protocol):
    """The low-latency operations of a backend. Arguments arrive checked.

    What every backend gives, bit by bit: `ep_comm.low_latency`. Both calls send. What they return
    receives when its `Pending.result` is asked for, which happens once, in any order among those
    that are out; where the request is not split, at once. Of each kind only the last two are out.
    """

    def num_kept_ints(self, max_tokens: int, num_topk: int) -> int:
        """Return how many int32 numbers a dispatch leaves on the device for its combine."""

    def dispatch(self, request: LowLatencyDispatchRequest) -> Pending[Any]:
        """Send rows.

        The result is what `combine` needs of the dispatch. It keeps its own memory, whatever is
        dispatched afterwards.
        """

    def combine(self, routing: Any, request: LowLatencyCombineRequest) -> Pending[None]:
        """Weight and sum rows, and send them to their tokens' owners.

        Args:
            routing: The result of a dispatch. It is combined again when the combine before was
                received.
            request: The rows, and where their sums go.
        """


class Backend(Protocol):
    """Moves tokens between the ranks of one group. Arguments arrive checked.

    Every backend gives the same bits (docs/architecture.md, "Numerics"). Every wait is bounded by
    ``config.timeout_s`` and raises `EPTimeoutError`.
    """

    name: str

    @property
    def recorder(self) -> Records:
        """The records that the buffer shows."""

    @classmethod
    def facts(cls, group: dist.ProcessGroup, config: EPConfig) -> object:
        """Return what other ranks need to know of this one to choose a backend (`job.codec`)."""

    @classmethod
    def unavailable_reason(cls, facts: list, spots: list[Spot], config: EPConfig) -> str | None:
        """Return why this backend cannot serve a group, or None where it can.

        Args:
            facts: Those of every rank, by group rank.
            spots: Where they are.
            config: The buffer's.

        Raises:
            EPArgumentError: The group is not as any buffer of its kind needs it.
        """

    @classmethod
    def create(
        cls, group: dist.ProcessGroup, config: EPConfig, meeting: Meeting, spots: list[Spot]
    ) -> Self:
        """Make the backend of one buffer, whose ranks met at `meeting`. Collective.

        Raises:
            EPUnsupportedError: Something that has to be installed, or to be otherwise, is not.
        """

    @property
    def low_latency(self) -> LowLatencyBackend | None:
        """Its low-latency operations; None where it has none, or ``config`` asks for none."""

    @property
    def buffer_bytes(self) -> int:
        """Device memory held beyond the outputs of operations."""

    @property
    def comm_stream(self) -> torch.cuda.Stream | None:
        """Where asynchronous operations run; None where that is the caller's stream."""

    @property
    def num_started(self) -> int:
        """Operations started, which other ranks may be waiting for."""

    @property
    def has_failed(self) -> bool:
        """Whether ranks may have given an operation up halfway: no other one can be trusted."""

    def waits(self) -> list[Wait]:
        """Return whom this rank waits for now. No call of CUDA; from any thread."""

    def describe(self) -> str:
        """Return the backend and its transport in a few words, for the start-up line."""

    def set_num_sms(self, num_sms: int | None) -> None:
        """Limit the SMs of an operation, where the backend has kernels of its own."""

    def set_overlapped(self, overlapped: bool) -> None:
        """Note whether computation runs beside every operation, asynchronous or not."""

    def set_gemm_tiles(self, tiles: int | None) -> None:
        """Note the size of the GEMM beside operations, where that makes a difference.

        Args:
            tiles: Of its output; None where nobody has said.
        """

    def overlap_loss(self, op: str, layout: RowLayout, num_bytes: int) -> str | None:
        """Return why an operation is not to run beside GEMMs; None where it is.

        Args:
            op: "dispatch" or "combine".
            layout: Order of its rows.
            num_bytes: Tokens of this rank times bytes of a row.
        """

    def check_device(self, name: str, rows: Tensor) -> None:
        """Refuse `rows` that it cannot send from where they are; `name` is for the message."""

    def check_wire_dtype(self, wire_dtype: torch.dtype, recv_dtype: torch.dtype) -> None:
        """Refuse rows that cannot travel as `wire_dtype` and arrive as `recv_dtype`."""

    def begin(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Begin to send rows whose routing is not known yet; their dispatch follows.

        Raises:
            EPArgumentError: Others are begun, and their dispatch has not come.
            EPUnsupportedError: This backend, or its wire, needs the routing.
        """

    def check_ahead(self, x: Tensor, scales: Tensor | None, wire_dtype: torch.dtype) -> None:
        """Refuse a dispatch of `x` where `begin` was called with something else.

        Raises:
            EPArgumentError: Says what is different.
        """

    def plan(self, request: PlanRequest) -> Routing:
        """Exchange the routing of a new dispatch.

        A dispatch with the routing follows at once. Bad content of the routing raises here, or,
        where the device has to find it, in that dispatch, once the other ranks have what they
        wait for.
        """

    def dispatch(self, routing: Any, request: DispatchRequest) -> Pending[Received]:
        """Send rows along a routing of this backend."""

    def combine(self, routing: Any, request: CombineRequest) -> Pending[Combined]:
        """Sum rows back to their tokens' owners, and scatter probabilities."""

    def synchronize(self) -> None:
        """Wait on the host for what was started; raise what ended it early."""

    def keep_for_comm_stream(self, tensors: Iterable[Tensor | None]) -> None:
        """Let the outputs of an asynchronous operation be freed at any time.

        Their memory is not used again before the operation is done.
        """

    def quiesce(self) -> int:
        """Have all that was started end, whatever has become of it.

        Returns:
            The highest number that an operation of this rank may have.

        Raises:
            EPUnsupportedError: The backend cannot mask ranks here, or not now.
        """

    def restart(self, masked: tuple[int, ...], first: int, store: dist.Store) -> None:
        """Begin anew without `masked`: nothing of before is ever taken for anything of after.

        Called behind `quiesce`, when it is behind it on all other ranks that go on. They call
        this too, and no operation begins before it has ended on all.

        Args:
            masked: Ranks that low-latency operations go on without. Nothing is sent to them or
                waited for; what they still send is never looked at.
            first: Low-latency operations count on from this number. It is even, the same on all
                ranks, and higher than any that `quiesce` gave.
            store: Of the ranks that go on, for this alone.
        """

    def give_up(self) -> None:
        """Have `destroy` wait for nobody: this rank failed, and others may not know of it."""

    def abandon(self) -> None:
        """Order the current stream behind what was started, after an error.

        The memory that it uses is about to be freed.
        """

    def destroy(self) -> None:
        """Free what the backend holds. Collective."""
