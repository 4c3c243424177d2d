"""Tokens for which experts of a fixed capacity had no room: counted on the device, said later.

With ``EPOptions(capacity_factor=F)`` every expert of a layer has rows for F times its even share of
all ranks' tokens, so that no host waits for counts. Kernels drop what does not fit, and count it.
`check_overflow` says it before the optimizer's step; `MoEMeter` makes scalars of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ep_comm.errors import EPExpertOverflowError
from ep_comm.events import HostCopy
from ep_comm.numeric import round_up

_log = logging.getLogger("ep_comm")
_DROPPED, _MOST = 0, 1  # rows of the statistics that a dispatch keeps
_WRAP = 2**32  # they are int32, and count on from the begin of a training


class ExpertOverflow:
    """What one layer's experts of this rank dropped, since the begin.

    Args:
        capacity_factor: At least 1.
        num_local_experts: Experts of this rank.
        first_expert: The number of the first of them in the layer; None where all of this rank's
            have their rows together.
        rank: This rank's number among those that share the layer's experts.

    Attributes:
        layer_number: The layer's number in the model, from 1, as soon as it is known.
        rows: What each expert had room for in the last dispatch, or all of them together.
        mean_rows: And its even share.
    """

    def __init__(
        self, capacity_factor: float, *, num_local_experts: int, first_expert: int | None, rank: int
    ) -> None:
        self._capacity_factor = capacity_factor
        self._num_local_experts = num_local_experts
        self._first_expert = first_expert
        self._rank = rank
        self.layer_number: int | None = None
        self.rows = 0
        self.mean_rows = 0.0
        self._stats: Tensor | None = None
        self._said = 0
        self._num_seen = 0

    def set_room(self, *, num_tokens: int, num_topk: int, num_experts: int, alignment: int) -> int:
        """Return the rows: the even share times the capacity factor, rounded up.

        Args:
            num_tokens: Of all ranks that share the experts.
            num_topk: Experts of a token.
            num_experts: Of the layer.
            alignment: The rows are a multiple of it.
        """
        self.mean_rows = num_tokens * num_topk / num_experts
        most = num_tokens  # that can come to an expert
        if self._first_expert is None:
            self.mean_rows *= self._num_local_experts
            most *= min(self._num_local_experts, num_topk)
        rows = min(math.ceil(self._capacity_factor * self.mean_rows), most)
        self.rows = max(round_up(rows, alignment), 1)
        return self.rows

    def stats(self, device: torch.device) -> Tensor:
        """Return int32 [2, E_local], for `ep_comm.Buffer.dispatch`; of the last one's device."""
        if self._stats is None or self._stats.device != device:
            shape = 2, self._num_local_experts
            with torch.inference_mode(False):  # the first dispatch may be in it, later ones not
                self._stats = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._stats

    @property
    def counted(self) -> Tensor | None:
        """The same; None where no dispatch has counted yet."""
        return self._stats

    def take(self, stats: list[list[int]]) -> tuple[int, float]:
        """Return the tokens dropped since the last call, and the capacity factor that keeps all.

        Args:
            stats: What is in `counted`.
        """
        num_dropped = sum(stats[_DROPPED])
        new, self._num_seen = (num_dropped - self._num_seen) % _WRAP, num_dropped
        return new, self._most(stats) / self.mean_rows

    def _most(self, stats: list[list[int]]) -> int:
        """Return the most rows that would have been needed: together, no fewer than that."""
        return max(stats[_MOST]) if self._first_expert is not None else sum(stats[_MOST])

    def error(self, stats: list[list[int]]) -> EPExpertOverflowError | None:
        """Return the error of the fullest expert in `stats`, where there is more than there was."""
        most = self._most(stats)
        if most <= max(self.rows, self._said) or not any(stats[_DROPPED]):
            return None
        self._said = most
        expert = None
        if self._first_expert is not None:
            expert = self._first_expert + stats[_MOST].index(most)
        return EPExpertOverflowError(
            num_rows=most,
            capacity=self.rows,
            layer=self.layer_number or 0,
            rank=self._rank,
            expert=expert,
            factor=most / self.mean_rows,
        )


# What a layer had counted by the last reading, and the reading, which several layers share.
_readings: WeakKeyDictionary[ExpertOverflow, tuple[Tensor, HostCopy]] = WeakKeyDictionary()


def check_overflow(model_chunks: Iterable[nn.Module]) -> None:
    """Say which experts got more tokens than they have rows for, before each optimizer step.

    A warning of the logger "ep_comm" names the fullest expert of each layer on this rank, and comes
    again when one is fuller. It waits for nothing, so what a step dropped may be said in the next
    one. With ``EPOptions(overflow="error")`` it is an error, for which the host waits for the
    backward pass. Does nothing where no layer has a capacity.

    Raises:
        EPExpertOverflowError: See above. On the ranks where it happened, and on no others.
    """
    raising: list[ExpertOverflow] = []
    warning: list[ExpertOverflow] = []
    for chunk in model_chunks:
        for module in chunk.modules():
            dispatcher: Any = getattr(module, "token_dispatcher", None)
            overflow = getattr(dispatcher, "overflow", None)
            if overflow is None or overflow.counted is None:
                continue
            overflow.layer_number = module.layer_number
            is_error = dispatcher.options.overflow == "error"
            (raising if is_error else warning).append(overflow)
    if raising:
        for each, found in zip(raising, _stacked(raising).tolist(), strict=True):
            if (error := each.error(found)) is not None:
                raise error
    if warning:
        _warn(warning)


def take_all(overflows: list[ExpertOverflow]) -> list[tuple[int, float]]:
    """Return `ExpertOverflow.take` of each, and have them look for new maxima from here on.

    The host waits for the device once. Those that have counted nothing yet are left out.
    """
    counting = [each for each in overflows if each.counted is not None]
    if not counting:
        return []
    stats = _stacked(counting).tolist()
    torch._foreach_zero_([each.counted[_MOST] for each in counting if each.counted is not None])
    return [each.take(found) for each, found in zip(counting, stats, strict=True)]


def _warn(overflows: list[ExpertOverflow]) -> None:
    """Warn of what the last reading has, once it is there, and begin the next one."""
    last = [(each, *_readings[each]) for each in overflows if each in _readings]
    if not all(reading.is_there for _, _, reading in last):
        return
    for each, found, _ in last:
        if (error := each.error(found.tolist())) is not None:
            _log.warning("%s", error)
    reading = HostCopy(_stacked(overflows))
    for each, found in zip(overflows, reading.host, strict=True):
        _readings[each] = found, reading


def _stacked(overflows: list[ExpertOverflow]) -> Tensor:
    """Return the statistics of layers that have some, [L, 2, E_local]."""
    return torch.stack([each.counted for each in overflows if each.counted is not None])
