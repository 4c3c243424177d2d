"""One MoE layer alone, from router to combine, forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from ep_comm.bench.timing import Stopwatch
from ep_comm.bench.train.model import Trainer
from ep_comm.bench.train.profile import BACKWARD, FORWARD, named
from ep_comm.bench.train.results import LayerTimes
from ep_comm.telemetry.records import TimedSpan, timed

_WARMUP = 5


class LayerAlone:
    """The model's first MoE layer, fed with random hidden states [S, B, H] of unit variance.

    The gradients of its weights are accumulated where those of training are; `Trainer.step`
    clears them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._model = trainer.trainee.model
        self._config = trainer.trainee.config
        self._layer = trainer.moe_layers()[0]
        generator = torch.Generator(trainer.device).manual_seed(dist.get_rank())
        shape = trainer.config.seq_length, trainer.config.micro_batch_size, self._config.hidden_size
        self.hidden, self._grad = (
            torch.randn(shape, generator=generator, device=trainer.device).to(
                self._config.params_dtype
            )
            for _ in range(2)
        )
        self.hidden.requires_grad_()

    def forward(self) -> Tensor:
        """Return [S, B, H], in the same precision as in training."""
        with named(FORWARD), get_fp8_context(self._config, self._layer.layer_number - 1):
            output, _ = self._layer(self.hidden)
        return output

    def backward(self, output: Tensor) -> None:
        """Go back from `forward`'s output with a gradient of unit variance; weights included."""
        self.hidden.grad = None
        with named(BACKWARD):
            output.backward(self._grad)
            if self._config.delay_wgrad_compute:  # Megatron's schedule asks for them
                self._layer.backward_dw(routed_experts=True, shared_experts=True)

    def once(self) -> None:
        """Run forward and backward."""
        self.backward(self.forward())

    def measure(self, watch: Stopwatch, iters: int) -> LayerTimes:
        """Time `iters` passes, after some to warm up. Collective."""
        with self._model.no_sync():  # data-parallel ranks reduce no gradients of these passes
            for _ in range(_WARMUP):
                self.once()
            spans = [self._timed(watch) for _ in range(iters)]
            forward = [1e3 * span.seconds for span, _ in spans]
            backward = [1e3 * span.seconds for _, span in spans]
            total = [sum(both) for both in zip(forward, backward, strict=True)]
            return LayerTimes(
                forward=watch.slowest(forward),
                backward=watch.slowest(backward),
                total=watch.slowest(total),
                combine=self._combine_alone(watch),
                hidden=self._hidden(watch, 2 * iters),
            )

    def _timed(self, watch: Stopwatch) -> tuple[TimedSpan, TimedSpan]:
        watch.align()
        with timed(watch.device) as forward:
            output = self.forward()
        with timed(watch.device) as backward:
            self.backward(output)
        return forward, backward

    def _hidden(self, watch: Stopwatch, pairs: int) -> tuple[float, ...]:
        """Return the ms that a backward gains by weight gradients beside its combine.

        That is how much longer it takes with them behind the combine. It is empty where a variant
        does not overlap them. The passes come in pairs, now one first, now the other: whatever the
        machine does meets both.
        """
        dispatcher = self._layer.token_dispatcher
        weight_gradients = getattr(dispatcher, "during_backward", None)
        if weight_gradients is None:
            return ()

        def timed_backward(*, overlapped: bool) -> TimedSpan:
            dispatcher.during_backward = weight_gradients if overlapped else None
            output = self.forward()
            watch.align()
            with timed(watch.device) as span:
                self.backward(output)
                if not overlapped:
                    weight_gradients()
            return span

        spans: dict[bool, list[TimedSpan]] = {False: [], True: []}
        try:
            for pair in range(pairs):
                for overlapped in (False, True) if pair % 2 else (True, False):
                    spans[overlapped].append(timed_backward(overlapped=overlapped))
        finally:
            dispatcher.during_backward = weight_gradients
        behind, beside = (
            watch.slowest([1e3 * span.seconds for span in spans[overlapped]])
            for overlapped in (False, True)
        )
        return tuple(one - other for one, other in zip(behind, beside, strict=True))

    @torch.no_grad()
    def _combine_alone(self, watch: Stopwatch) -> tuple[float, ...]:
        """Time combines of rows and probabilities, as the backward has them, in ms.

        The routing is that of the last forward.
        """
        dispatcher = self._layer.token_dispatcher
        buffer = getattr(dispatcher, "buffer", None)
        if buffer is None:
            return ()
        handle = dispatcher.handle
        rows = torch.randn(
            handle.num_rows, self._config.hidden_size, device=watch.device, dtype=self.hidden.dtype
        )
        weights = torch.randn(handle.num_rows, device=watch.device)
        samples = watch.measure(lambda i: buffer.combine(rows, handle, weights), buffer.records)
        return tuple(us / 1e3 for us in samples.kernel)
