"""Routings to measure with: which experts each token selects.

They are drawn, deterministic by seed, or those of a training run (`ep_comm.routing.capture`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ep_comm.job.exits import UserError
from ep_comm.routing import capture
from ep_comm.routing.capture import Capture, spread

NUM_SETS = 3  # of inputs, each with a routing of its own: a benchmark takes them in turns
REPLAY = "replay"
KINDS = ("uniform", "group-limited", "zipf")
_PERMUTATION_SEED = 0  # the same experts are hot on every rank and in every set


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """How tokens select experts.

    Attributes:
        kind: "uniform": every set of experts is as likely. "group-limited": as DeepSeek-V3 does,
            see `make_routing`. "zipf": some experts are drawn more often.
        skew: Of "zipf": the expert of popularity rank i (from 0) has weight 1 / (1 + i)^skew.
        num_groups: Of "group-limited": equal groups of consecutive experts.
        topk_groups: Of "group-limited": groups that a token's experts come from.
        replay: Of `REPLAY`: the folder of a captured step, whose experts the tokens select.
    """

    kind: str = "uniform"
    skew: float = 1.2
    num_groups: int = 8
    topk_groups: int = 4
    replay: str | None = None

    @classmethod
    def of_flags(
        cls,
        kind: str | None,
        num_groups: int | None,
        topk_groups: int | None,
        skew: float | None = None,
        replay: Path | None = None,
    ) -> RoutingSpec:
        """Return what flags ask for; None is a flag that was not given.

        Raises:
            UserError: Flags contradict each other, or there is nothing to replay.
        """
        if replay is not None:
            others = (kind, num_groups, topk_groups, skew)
            if any(value is not None for value in others):
                raise UserError(f"--replay {replay}: no other flag of the routing goes with it")
            return cls(kind=REPLAY, replay=str(capture.read(replay).folder))
        if (num_groups is None) != (topk_groups is None):
            raise UserError("--num-groups and --topk-groups: pass both, or none")
        if kind is None:
            kind = "uniform" if num_groups is None else "group-limited"
        if num_groups is not None and kind in KINDS and kind != "group-limited":
            raise UserError(f"--num-groups {num_groups} has no effect with --routing {kind}")
        given: dict[str, Any] = dict(num_groups=num_groups, topk_groups=topk_groups, skew=skew)
        return cls(kind=kind, **{name: v for name, v in given.items() if v is not None})

    @classmethod
    def of_json(cls, settings: Mapping[str, Any]) -> RoutingSpec:
        """Return the routing of a benchmark's file. Older ones call `topk_groups` "group_topk"."""
        return cls(
            **{{"group_topk": "topk_groups"}.get(name, name): v for name, v in settings.items()}
        )

    def check(self, num_experts: int, num_topk: int) -> None:
        """Raise `UserError` where `num_topk` of `num_experts` cannot be selected like this."""
        if self.kind == REPLAY:
            sizes = self.captured.sizes
            for flag, asked, found in (
                ("--experts", num_experts, sizes.num_experts),
                ("--topk", num_topk, sizes.num_topk),
            ):
                if asked != found:
                    raise UserError(f"{flag} {asked}: the capture {self.replay} has {found}")
            return
        if self.kind not in KINDS:
            raise UserError(f"--routing {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == "zipf" and not (self.skew >= 0 and math.isfinite(self.skew)):
            raise UserError(f"--skew {self.skew} must be a finite number of at least 0")
        if self.kind != "group-limited":
            return
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise UserError(
                f"--num-groups {self.num_groups} does not divide --experts {num_experts} into "
                "equal groups"
            )
        if not 1 <= self.topk_groups <= self.num_groups:
            raise UserError(
                f"--topk-groups {self.topk_groups} is not in 1 to --num-groups {self.num_groups}"
            )
        reachable = self.topk_groups * (num_experts // self.num_groups)
        if reachable < num_topk:
            raise UserError(
                f"--topk-groups {self.topk_groups} of --num-groups {self.num_groups} leaves a "
                f"token {reachable} experts, fewer than --topk {num_topk}"
            )

    def check_job(self, num_ranks: int, num_tokens: int) -> None:
        """Raise `UserError` where so many ranks cannot replay so many tokens of each."""
        if self.kind != REPLAY:
            return
        captured = self.captured
        if captured.sizes.num_ranks != num_ranks:
            raise UserError(
                f"--replay {self.replay} is of {captured.sizes.num_ranks} ranks, and this job has "
                f"{num_ranks}: which experts live together is part of a routing. Start as many, "
                "or capture a run with as many"
            )
        if num_tokens > captured.tokens:
            raise UserError(
                f"--tokens {num_tokens} is more than the {captured.tokens} of a rank that the "
                f"capture {self.replay} has"
            )
        if captured.has_dropped:
            raise UserError(
                f"--replay {self.replay}: the run dropped tokens, and what is measured drops none. "
                "Capture a run without --moe-expert-capacity-factor"
            )

    @property
    def captured(self) -> Capture:
        """The step to replay.

        Raises:
            UserError: It cannot be read.
        """
        assert self.replay is not None  # of this kind
        return _read(Path(self.replay))

    def describe(self) -> str:
        """Return the routing in a few words."""
        if self.replay is not None:
            return f"replay of {'/'.join(Path(self.replay).parts[-2:])}"
        if self.kind == "zipf":
            return f"zipf, skew {self.skew:g}"
        if self.kind == "group-limited":
            return f"{self.topk_groups} of {self.num_groups} groups"
        return self.kind


def routing_of(
    spec: RoutingSpec,
    num_tokens: int,
    num_experts: int,
    num_topk: int,
    *,
    rank: int,
    number: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return the experts of a rank's tokens in one set of inputs, and their probabilities.

    A replay takes of the captured layers as many as there are sets, spread evenly, and of a rank's
    tokens as many as asked for, spread evenly too. Its probabilities are drawn.

    Args:
        spec: The routing.
        num_tokens: T.
        num_experts: Over all ranks.
        num_topk: K.
        rank: Whose tokens.
        number: Of the set, below `NUM_SETS`.
        seed: Of what is drawn.

    Returns:
        As `make_routing`.
    """
    if spec.kind != REPLAY:
        return make_routing(spec, num_tokens, num_experts, num_topk, seed)
    layers = spec.captured.topk_idx
    rows = layers[spread(len(layers), NUM_SETS)[number]][rank]
    topk_idx = rows[spread(len(rows), num_tokens)].astype(np.int64)
    generator = torch.Generator().manual_seed(seed)
    scores_TK = torch.rand(num_tokens, num_topk, generator=generator)
    return torch.from_numpy(topk_idx), scores_TK.softmax(dim=1)


def make_routing(
    spec: RoutingSpec, num_tokens: int, num_experts: int, num_topk: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw the experts of `num_tokens` tokens, and their probabilities.

    A token takes the experts of its `num_topk` highest random scores. Group-limited: a group counts
    as much as its two highest scores together, and only experts of the best groups are taken. Zipf:
    the scores are such (log weight plus Gumbel noise) that experts are drawn one by one, without
    repetition, in proportion to their weights.

    Returns:
        [T, K] int64 without repetition in a row, and [T, K] FP32 that sum to 1; on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(num_tokens, num_experts, generator=generator)
    if spec.kind == "group-limited":
        scores_TE = _in_best_groups(scores_TE, spec)
    elif spec.kind == "zipf":
        gumbel_TE = -torch.log(torch.empty_like(scores_TE).exponential_(generator=generator))
        scores_TE = gumbel_TE - spec.skew * _popularity(num_experts).add(1).log()
    topk_scores, topk_idx = scores_TE.topk(num_topk, dim=1)
    return topk_idx, topk_scores.softmax(dim=1)


def tokens_per_expert(topk_idx_TK: Tensor, num_experts: int) -> Tensor:
    """Return [E] int64: tokens that select each expert."""
    return torch.bincount(topk_idx_TK.flatten(), minlength=num_experts)


def tokens_per_rank(topk_idx_TK: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """Return [R] int64: tokens that go to each rank, once for all of its experts."""
    goes_TR = torch.zeros(topk_idx_TK.shape[0], num_ranks, dtype=torch.int64)
    goes_TR.scatter_(1, topk_idx_TK // (num_experts // num_ranks), 1)
    return goes_TR.sum(dim=0)


_read = functools.lru_cache(capture.read)


def _in_best_groups(scores_TE: Tensor, spec: RoutingSpec) -> Tensor:
    """Return the scores, and minus infinity outside each token's best groups."""
    scores_TGe = scores_TE.unflatten(1, (spec.num_groups, -1))
    best_two = scores_TGe.topk(min(2, scores_TGe.shape[2]), dim=2).values.sum(dim=2)
    chosen = best_two.topk(spec.topk_groups, dim=1).indices
    outside_TG = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, chosen, False)
    return scores_TGe.masked_fill(outside_TG.unsqueeze(2), -torch.inf).flatten(1)


def _popularity(num_experts: int) -> Tensor:
    """Return [E] popularity ranks, 0 the most popular: a fixed random permutation."""
    generator = torch.Generator().manual_seed(_PERMUTATION_SEED)
    return torch.randperm(num_experts, generator=generator)
