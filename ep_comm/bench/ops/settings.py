"""What a benchmark run measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ep_comm import EPConfig
from ep_comm._native import header
from ep_comm.bench.ops.routing import REPLAY, RoutingSpec
from ep_comm.handle import RowLayout
from ep_comm.job.exits import UserError

LAYOUTS: tuple[RowLayout, ...] = ("expert", "rank")
MIN_ITERS = 20


class Shape(NamedTuple):
    """Tokens a rank, elements a token, experts over all ranks, experts a token."""

    tokens: int
    hidden: int
    experts: int
    topk: int


PRESETS = {
    "W1": Shape(tokens=4096, hidden=7168, experts=256, topk=8),
    "W2": Shape(tokens=8192, hidden=2048, experts=128, topk=8),
}
DEFAULT_PRESET = "W1"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of the benchmark; equal on all ranks.

    Attributes:
        shape: Size of the operations.
        routing: Which experts the tokens select.
        sms: SM counts to measure with; 0 is all of the GPU's.
        fp8: Also measure dispatch with FP8 on the wire.
        layout: Order of the received rows, see `ep_comm.Buffer.dispatch`.
        iters: Samples of each time.
    """

    shape: Shape
    routing: RoutingSpec
    sms: tuple[int, ...]
    fp8: bool
    layout: RowLayout
    iters: int

    def check(self) -> None:
        """Raise `UserError` on the first value that cannot be measured anywhere."""
        for name, value in self.shape._asdict().items():
            if value < 1:
                raise UserError(f"--{name} {value} must be positive")
        _, hidden, experts, topk = self.shape
        if topk > min(experts, header.EP_MAX_TOPK):
            raise UserError(
                f"--topk {topk} is more than {min(experts, header.EP_MAX_TOPK)}, the lesser of "
                f"--experts and the kernels' {header.EP_MAX_TOPK}"
            )
        multiple = 512 if self.fp8 else 8
        if hidden % multiple:
            reason = "with --fp8" if self.fp8 else "rows are multiples of 16 bytes"
            raise UserError(f"--hidden {hidden} is not a multiple of {multiple} ({reason})")
        if self.layout not in LAYOUTS:
            raise UserError(f"--layout {self.layout!r} is none of {', '.join(LAYOUTS)}")
        if self.iters < MIN_ITERS:
            raise UserError(f"--iters {self.iters} is too few for a p90: at least {MIN_ITERS}")
        self.routing.check(experts, topk)

    def check_job(self, num_ranks: int, available_sms: int) -> None:
        """Raise `UserError` on the first value that cannot be measured by this job.

        Args:
            num_ranks: Ranks of the job.
            available_sms: SMs of each GPU.
        """
        if not 2 <= num_ranks <= header.EP_MAX_PEERS:
            raise UserError(
                f"{num_ranks} rank(s): bench measures 2 to {header.EP_MAX_PEERS} GPUs of one "
                "host; pass torchrun another --nproc_per_node"
            )
        experts = self.shape.experts
        if experts % num_ranks:
            raise UserError(f"--experts {experts} is not divisible by the {num_ranks} ranks")
        self.routing.check_job(num_ranks, self.shape.tokens)
        for count in self.sms:
            if count and not 2 <= count <= available_sms:
                raise UserError(f"--sms {count} is neither 0 (all) nor 2 to {available_sms}")

    def buffer_config(self, device: torch.device) -> EPConfig:
        """Config of the buffer under test: our kernels on a GPU, the reference on a CPU."""
        return EPConfig(
            num_experts=self.shape.experts,
            hidden=self.shape.hidden,
            max_tokens_per_rank=self.shape.tokens,
            num_topk=self.shape.topk,
            backend="nvlink" if device.type == "cuda" else "reference",
        )


def shape_of_flags(preset: str | None, routing: RoutingSpec, **sizes: int | None) -> Shape:
    """Return a preset's sizes, or those of a capture, but for those that were given.

    Raises:
        UserError: There is no such preset, or it is given beside a capture.
    """
    if routing.kind == REPLAY:
        if preset is not None:
            raise UserError(f"--preset {preset} and --replay: a capture has sizes of its own")
        captured = routing.captured
        experts, topk, hidden, _ = captured.sizes
        return with_flags(Shape(captured.tokens, hidden, experts, topk), **sizes)
    preset = preset or DEFAULT_PRESET
    if preset not in PRESETS:
        raise UserError(f"--preset {preset!r} is none of {', '.join(PRESETS)}")
    return with_flags(PRESETS[preset], **sizes)


def with_flags(shape: Shape, **sizes: int | None) -> Shape:
    """Return sizes, but for those that were given."""
    given = {name: size for name, size in sizes.items() if size is not None}
    return shape._replace(**given)


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a comma-separated list, each once, in the order given."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"{flag} {text!r} must be comma-separated numbers, such as 8,128") from None
