"""One measurement: GEMMs on one stream, operations back to back on another one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ep_comm.bench.overlap.gemms import Gemm
from ep_comm.bench.overlap.price import Beside, Span, gemms_of_run, operations_of_run, serial_price
from ep_comm.bench.timing import Stopwatch

Call = Callable[[int], object]  # of the i-th operation; the current stream ends up behind it

_WINDOW_US = 10_000  # of GEMMs alone: some dozens of operations
_ALONE = 8
_SERIAL = 8


class Bench:
    """A GEMM and the streams on which it runs and operations beside it. Collective.

    Args:
        watch: Aligns the ranks.
        gemm: What runs beside.

    Attributes:
        last: What the last operation gave, and its number.
        num_gemms: Of a run.
    """

    def __init__(self, watch: Stopwatch, gemm: Gemm) -> None:
        self._watch = watch
        self._gemm = gemm
        self._gemms = torch.cuda.Stream(watch.device)
        # Operations of training run at high priority: their kernels are short, and ranks wait.
        self._operations = torch.cuda.Stream(watch.device, priority=-1)
        self.last: tuple[int, object] = (0, None)
        for _ in range(2):  # warm, and then with the clocks of a GPU that works
            one = self._run(20, None, 0)
        length = one.gemms.end - one.gemms.begin
        self.num_gemms = gemms_of_run(max(watch.slowest([length / 20])), _WINDOW_US)

    def gemms_alone(self) -> float:
        """Return the µs of a run's GEMMs with nothing beside them, on this rank."""
        gemms = self._run(self.num_gemms, None, 0).gemms
        return gemms.end - gemms.begin

    def alone(self, call: Call) -> list[float]:
        """Return the µs of some operations with no GEMM beside them, on this rank."""
        spans = self._run(0, call, _ALONE + 1).operations
        return [span.end - span.begin for span in spans[1:]]

    def beside(self, call: Call, alone_us: float, gemms_us: float) -> Beside:
        """Run GEMMs with operations beside them.

        Args:
            call: An operation.
            alone_us: Its time alone, the same on all ranks.
            gemms_us: That of the GEMMs alone, the same on all ranks.
        """
        return self._run(self.num_gemms, call, operations_of_run(alone_us, gemms_us))

    def serial(self, call: Call, gemms_us: float) -> float:
        """Return the µs that operations take which have a GEMM between each other, on this rank.

        Args:
            call: An operation, on the current stream.
            gemms_us: `gemms_alone` of this rank.
        """
        self._watch.align()
        begin, end = _event(), _event()
        begin.record()
        for i in range(_SERIAL):
            self._gemm.call()
            call(i)
        end.record()
        torch.cuda.synchronize(self._watch.device)
        gemms_us *= _SERIAL / self.num_gemms
        return serial_price(1e3 * begin.elapsed_time(end), gemms_us, _SERIAL)

    def _run(self, num_gemms: int, call: Call | None, num_operations: int) -> Beside:
        self._watch.align()
        zero = _event()
        zero.record()
        current = torch.cuda.current_stream(self._watch.device)
        for stream in (self._gemms, self._operations):
            stream.wait_stream(current)
        with torch.cuda.stream(self._gemms):
            gemms = [_event(), _event()]
            gemms[0].record()
            for _ in range(num_gemms):
                self._gemm.call()
            gemms[1].record()
        with torch.cuda.stream(self._operations):
            marks = [_event() for _ in range(num_operations + 1)]
            marks[0].record()
            for i in range(num_operations):
                assert call is not None
                self.last = (i, call(i))
                marks[i + 1].record()
        torch.cuda.synchronize(self._watch.device)

        def us(event: torch.cuda.Event) -> float:
            return 1e3 * zero.elapsed_time(event)

        return Beside(
            gemms=Span(us(gemms[0]), us(gemms[1])),
            operations=tuple(
                Span(us(first), us(second)) for first, second in zip(marks, marks[1:], strict=False)
            ),
        )


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
