"""What a run of ``ep-comm bench low-latency`` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ep_comm import EPConfig
from ep_comm._native import header
from ep_comm.backends.nodes.tuning import MIN_SMS
from ep_comm.bench.ops.routing import REPLAY, RoutingSpec
from ep_comm.fp8 import BLOCK
from ep_comm.job.exits import UserError
from ep_comm.numeric import round_up

TOKENS = (1, 8, 32, 128, 256)
HIDDEN = (7168,)
ALL_HIDDEN = (2048, 4096, 7168)
TOPK = 8
EXPERTS = 288
REPLAYS = 500
QUICK_TOKENS = (8, 128)
QUICK_REPLAYS = 100
# Serving engines make room for many tokens and send few.
COMMON_ROOM = 128
MIN_REPLAYS = 10

BackendName = Literal["nvlink", "nodes", "reference"]
BACKENDS: tuple[BackendName, ...] = ("nvlink", "nodes", "reference")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size to measure.

    Attributes:
        hidden: Elements of a token.
        tokens: Of each rank.
        room: Most tokens of a rank, ``num_max_dispatch_tokens_per_rank``.
        num_sms: SMs of an operation; 0 is all of the GPU's.
    """

    hidden: int
    tokens: int
    room: int
    num_sms: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run of the benchmark; equal on all ranks.

    Attributes:
        tokens: Numbers of tokens of a rank.
        hidden: Hidden sizes.
        topk: Experts of a token.
        experts: Over all ranks, a multiple of these.
        routing: Which experts the tokens select.
        fp8: Dispatch FP8 rows; else BF16. Combine is BF16.
        num_sms: SM counts; 0 is all of the GPU's.
        replays: Of each CUDA graph.
        backend: "nvlink", our kernels; "nodes", those between hosts, with each GPU for a node and
            NVLink for a network; or "reference", of which the host's time is measured.
    """

    tokens: tuple[int, ...] = TOKENS
    hidden: tuple[int, ...] = HIDDEN
    topk: int = TOPK
    experts: int = EXPERTS
    routing: RoutingSpec = RoutingSpec()
    fp8: bool = True
    num_sms: tuple[int, ...] = (0,)
    replays: int = REPLAYS
    backend: BackendName = "nvlink"

    def check(self) -> None:
        """Raise `UserError` on the first value that cannot be measured anywhere."""
        for name in ("tokens", "hidden"):
            for value in getattr(self, name):
                if value < 1:
                    raise UserError(f"--{name} {value} must be positive")
        for name in ("topk", "experts"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be positive")
        most = header.EP_LOW_LATENCY_MAX_TOKENS
        if max(self.tokens) > most:
            raise UserError(f"--tokens {max(self.tokens)} is more than {most}")
        if self.topk > min(self.experts, header.EP_MAX_TOPK):
            raise UserError(
                f"--topk {self.topk} is more than {min(self.experts, header.EP_MAX_TOPK)}, the "
                f"lesser of --experts and the kernels' {header.EP_MAX_TOPK}"
            )
        if self.experts > header.EP_MAX_EXPERTS:
            raise UserError(f"--experts {self.experts} is more than {header.EP_MAX_EXPERTS}")
        self.routing.check(self.experts, self.topk)
        multiple = BLOCK if self.fp8 else 8
        for hidden in self.hidden:
            if hidden % multiple:
                reason = "FP8 has a scale for so many; or --bf16" if self.fp8 else "of 16 bytes"
                raise UserError(f"--hidden {hidden} is not a multiple of {multiple} ({reason})")
        if self.replays < MIN_REPLAYS:
            raise UserError(f"--replays {self.replays} is too few: at least {MIN_REPLAYS}")
        if self.backend not in BACKENDS:
            raise UserError(f"--backend {self.backend!r} is none of {', '.join(BACKENDS)}")

    def check_job(self, num_ranks: int, available_sms: int | None) -> None:
        """Raise `UserError` on the first value that cannot be measured by this job.

        Args:
            num_ranks: Ranks of the job.
            available_sms: SMs of each GPU; None without GPUs.
        """
        if self.backend != "reference" and available_sms is None:
            raise UserError(
                "bench low-latency needs CUDA GPUs, and torch sees none (ep-comm doctor says "
                "more); --backend reference times the host of CPU ranks"
            )
        if self.backend == "reference" and available_sms is not None:
            raise UserError(
                "--backend reference times CPU ranks: hide the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        if not 2 <= num_ranks <= header.EP_MAX_PEERS:
            raise UserError(
                f"{num_ranks} rank(s): bench low-latency measures 2 to {header.EP_MAX_PEERS} GPUs "
                "of one host; pass torchrun another --nproc_per_node"
            )
        if (experts := self.num_experts(num_ranks)) > header.EP_MAX_EXPERTS:
            raise UserError(f"--experts {experts} is more than {header.EP_MAX_EXPERTS}")
        self.routing.check(experts, self.topk)
        self.routing.check_job(num_ranks, max(self.tokens))
        places = experts * self.most_tokens
        if places > header.EP_LOW_LATENCY_MAX_PLACES:
            raise UserError(
                f"--experts {experts} x {self.most_tokens} tokens is more than "
                f"{header.EP_LOW_LATENCY_MAX_PLACES}, what a kernel has room to count"
            )
        for count in self.num_sms:
            if available_sms is None and count:
                raise UserError(f"--num-sms {count} has no effect on the reference backend")
            fewest = MIN_SMS if self.backend == "nodes" else 2
            if available_sms is not None and count and not fewest <= count <= available_sms:
                raise UserError(
                    f"--num-sms {count} is neither 0 (all) nor {fewest} to {available_sms}"
                )

    def num_experts(self, num_ranks: int) -> int:
        """Return the experts, rounded up to a multiple of the ranks."""
        return round_up(self.experts, num_ranks)

    @property
    def most_tokens(self) -> int:
        """The largest room of any point."""
        return max(point.room for point in self.points(self.hidden[0]))

    def points(self, hidden: int) -> list[Point]:
        """Return what to measure with one hidden size: all rooms of a token count in a row."""
        return [
            Point(hidden=hidden, tokens=tokens, room=room, num_sms=num_sms)
            for num_sms in self.num_sms
            for tokens in self.tokens
            for room in ((tokens, COMMON_ROOM) if tokens < COMMON_ROOM else (tokens,))
        ]

    def buffer_config(self, hidden: int, num_ranks: int) -> EPConfig:
        """Config of the buffer under test, which serves all points of a hidden size."""
        return EPConfig(
            num_experts=self.num_experts(num_ranks),
            hidden=hidden,
            max_tokens_per_rank=1,  # of normal operations: there are none
            num_topk=self.topk,
            backend=self.backend,
            ranks_per_node=1 if self.backend == "nodes" else None,
            low_latency_tokens=self.most_tokens,
            dtype=torch.bfloat16,
        )


def sizes(
    *,
    tokens: tuple[int, ...] | None,
    hidden: tuple[int, ...] | None,
    replays: int | None,
    full: bool,
    quick: bool,
    topk: int | None,
    experts: int | None,
    routing: RoutingSpec,
    **others: Any,
) -> Settings:
    """Return settings; None stands for what `full` and `quick` say, or what a capture has.

    Args:
        tokens: As in `Settings`, like the next two.
        hidden: The same.
        replays: The same.
        full: All hidden sizes that models have.
        quick: Few tokens and replays.
        topk: As in `Settings`, like the next two.
        experts: The same.
        routing: The same.
        others: Of `Settings`.

    Raises:
        UserError: A flag has no effect.
    """
    if full and hidden is not None:
        raise UserError("--full and --hidden: pass one of them")
    one_hidden = HIDDEN
    if routing.kind == REPLAY:
        captured = routing.captured.sizes
        one_hidden = (captured.hidden,)
        topk = captured.num_topk if topk is None else topk
        experts = captured.num_experts if experts is None else experts
    return Settings(
        tokens=tokens or (QUICK_TOKENS if quick else TOKENS),
        hidden=hidden or (ALL_HIDDEN if full else one_hidden),
        replays=(QUICK_REPLAYS if quick else REPLAYS) if replays is None else replays,
        topk=TOPK if topk is None else topk,
        experts=EXPERTS if experts is None else experts,
        routing=routing,
        **others,
    )
