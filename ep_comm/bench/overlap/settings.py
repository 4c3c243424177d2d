"""What ``ep-comm bench overlap`` measures."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from ep_comm import EPArgumentError, EPConfig
from ep_comm.bench.ops.routing import RoutingSpec
from ep_comm.bench.ops.settings import LAYOUTS, MIN_ITERS, Settings, Shape
from ep_comm.config import Wire
from ep_comm.handle import RowLayout
from ep_comm.job.exits import UserError, needs_extra

MIN_RUNS = 3


class GemmShape(NamedTuple):
    """A dense GEMM: [M, K] times [K, N]."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class ExpertShape(NamedTuple):
    """The first layer of a model's experts: gate and value side by side.

    Attributes:
        name: Of the model.
        hidden: Elements of a token.
        ffn: Hidden size of an expert.
    """

    name: str
    hidden: int
    ffn: int


@dataclass(frozen=True, kw_only=True)
class OverlapSettings:
    """One run; equal on all ranks.

    Attributes:
        shape: Size of the operations.
        routing: Which experts the tokens select.
        sms: SM counts to measure with; 0 is all of the GPU's.
        layouts: Orders of the received rows.
        fp8: Also measure dispatch with FP8 on the wire.
        gemms: Dense GEMMs to run beside.
        experts: A model whose grouped GEMM runs beside too; needs Transformer Engine.
        runs: Of each operation, each with GEMMs alone just before.
        wire: What moves the rows, see `EPConfig`.
    """

    shape: Shape
    routing: RoutingSpec
    sms: tuple[int, ...]
    layouts: tuple[RowLayout, ...]
    fp8: bool
    gemms: tuple[GemmShape, ...]
    experts: ExpertShape | None
    runs: int
    wire: Wire = "sm"

    def config(self, device: torch.device) -> EPConfig:
        """Return that of the buffer."""
        config = self.operations(self.layouts[0]).buffer_config(device)
        return dataclasses.replace(config, wire=self.wire)

    def operations(self, layout: RowLayout) -> Settings:
        """Return the operations with rows in one order, as ``ep-comm bench`` has them."""
        return Settings(
            shape=self.shape,
            routing=self.routing,
            sms=self.sms,
            fp8=self.fp8,
            layout=layout,
            iters=MIN_ITERS,
        )

    def check(self) -> None:
        """Raise `UserError` on the first value that cannot be measured anywhere."""
        for layout in self.layouts:
            self.operations(layout).check()
        for gemm in self.gemms:
            # cuBLAS takes no Tensor Cores for rows that are no multiple of 16 bytes.
            if min(gemm) < 8 or gemm.n % 8 or gemm.k % 8:
                raise UserError(f"--gemm {gemm}: N and K must be multiples of 8, and M at least 8")
        if not self.gemms and self.experts is None:
            raise UserError("nothing to run beside: pass --gemm, --model, or both")
        if self.wire not in get_args(Wire):
            raise UserError(f"--wire {self.wire!r} is none of {', '.join(get_args(Wire))}")
        if self.runs < MIN_RUNS:
            raise UserError(f"--runs {self.runs} is too few for a median: at least {MIN_RUNS}")

    def check_job(self, num_ranks: int, available_sms: int) -> None:
        """Raise `UserError` on the first value that cannot be measured by this job."""
        self.operations(self.layouts[0]).check_job(num_ranks, available_sms)
        try:
            self.config(torch.device("cuda")).check_group(num_ranks)
        except EPArgumentError as error:
            raise UserError(f"--wire {self.wire}: {error}") from None


def parse_gemms(text: str) -> tuple[GemmShape, ...]:
    """Return the GEMMs of a comma-separated list of MxNxK, each once, in the order given."""
    found = [re.fullmatch(r"(\d+)x(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    if not all(found):
        raise UserError(f"--gemm {text!r} must be MxNxK, such as 4096x4096x7168, or several")
    return tuple(dict.fromkeys(GemmShape(*map(int, each.groups())) for each in found if each))


def parse_layouts(text: str) -> tuple[RowLayout, ...]:
    """Return the layouts of a comma-separated list, each once, in the order given.

    Raises:
        UserError: One is none.
    """
    names = dict.fromkeys(part.strip() for part in text.split(","))
    for name in names:
        if name not in LAYOUTS:
            raise UserError(f"--layouts {name!r} is none of {', '.join(LAYOUTS)}")
    return tuple(layout for name in names for layout in LAYOUTS if layout == name)


def of_model(path: Path) -> tuple[Shape, ExpertShape]:
    """Return the size of a model's operations, and its experts.

    Args:
        path: A configuration of ``ep_comm.pretrain``, or the name of one that we ship.

    Raises:
        UserError: There is no such file, or it is wrong.
    """
    with needs_extra("megatron"):
        from ep_comm.pretrain.config_files import find_config
        from ep_comm.pretrain.flags import parse_args

    found = find_config(path)
    config = parse_args(["--config", str(found)])
    shape = Shape(
        tokens=config.micro_batch_size * config.seq_length,
        hidden=config.hidden_size,
        experts=config.num_experts,
        topk=config.moe_router_topk,
    )
    return shape, ExpertShape(found.stem, config.hidden_size, config.moe_ffn_hidden_size)
