"""Every error that ep_comm raises on purpose.

All of them derive from `EPError`, so ``except ep_comm.EPError`` catches what the library itself
has to say and nothing else. Argument errors are `ValueError`s too, and the rest `RuntimeError`s,
for callers that know nothing of ep_comm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

_name_of_setting: Callable[[str], str] = "EPConfig({}=...)".format


def name_settings(name_of: Callable[[str], str]) -> None:
    """Have this process's messages call a setting what its user knows it by.

    `name_of` takes the field of `EPConfig`, such as ``"timeout_s"``.
    A tool with switches of its own gives theirs, such as ``--ep-timeout``.
    """
    global _name_of_setting
    _name_of_setting = name_of


def setting(field: str) -> str:
    """Return what the user of this process knows a field of `EPConfig` by."""
    return _name_of_setting(field)


class EPError(Exception):
    """Base class of all errors raised by ep_comm.

    Attributes:
        file: Of an error that ended a buffer: where this rank has left its last operations, see
            ``ep-comm explain``; else None.
    """

    file: Path | None = None

    @property
    def _where(self) -> str:
        return "" if self.file is None else f" Last operations: {self.file} (ep-comm explain)."


class EPArgumentError(EPError, ValueError):
    """An argument is wrong.

    Raised before anything is sent or launched, and the buffer stays usable; but see
    `EPRoutingError`.
    """


class EPRoutingError(EPArgumentError):
    """The routing of a new dispatch is wrong.

    ``topk_idx`` or ``routing_map`` names an expert that does not exist, or one twice; or a rank has
    more tokens than the buffer was made for.

    Over NVLink it is found when the routing was sent: the dispatch is complete on the other ranks,
    what was wrong dropped. On the reference backend a rank raises for its own entries before it
    sends anything, and the others wait for it. Too many tokens are raised on all ranks, as
    `EPTooManyTokensError`. The buffer stays usable.
    """


class EPUnsupportedError(EPError, NotImplementedError):
    """A feature that this version refuses by name."""


SAME_CALLS = (
    "Every rank of the group must make the same calls, in the same order, with the same settings."
)


class EPMismatchError(EPError, RuntimeError):
    """Ranks of one group called different operations, or the same one with different shapes."""

    def __str__(self) -> str:
        return super().__str__() + self._where


class EPStateError(EPError, RuntimeError):
    """The buffer cannot be used: it was destroyed, or an earlier operation failed on it.

    Or not yet: another call has to come first, which the message names. The buffer is then as
    before.
    """


@dataclass(eq=False, repr=False)
class _WithFields(EPError):
    """Errors with fields, which reach other processes too: by itself pickle keeps ``args`` only."""

    def __reduce__(self) -> tuple:
        state = {} if self.file is None else {"file": self.file}
        return functools.partial(type(self), **asdict(self)), (), state


@dataclass(eq=False)
class EPTooManyTokensError(_WithFields, EPRoutingError):
    """A rank dispatches more tokens than the buffer was made for. Raised on all ranks.

    The buffer stays usable; but not over NVLink with ``num_worst_tokens``: there a later call
    raises it, when ranks may be an operation apart.

    Attributes:
        num_tokens: Tokens that each rank dispatches, by group rank.
        max_tokens: Tokens that there is room for.
    """

    num_tokens: tuple[int, ...]
    max_tokens: int

    def __str__(self) -> str:
        rank, tokens = next(
            (r, tokens) for r, tokens in enumerate(self.num_tokens) if tokens > self.max_tokens
        )
        return (
            f"rank {rank} dispatches {tokens} tokens, more than the {self.max_tokens} that the "
            f"buffer was made for: raise {setting('max_tokens_per_rank')}"
        )


@dataclass(eq=False)
class EPOverflowError(_WithFields, RuntimeError):
    """More rows came than the output of a dispatch with ``num_worst_tokens`` has.

    With ``expert_capacity``: a group got more tokens than that, and its rows are a multiple of it.

    The rest was dropped. The buffer stays usable; results computed from the output are wrong.

    Attributes:
        num_rows: Rows that the output would have needed, padding included.
        capacity: Rows that it had.
    """

    num_rows: int
    capacity: int

    def __str__(self) -> str:
        return (
            f"a dispatch with num_worst_tokens={self.capacity} received {self.num_rows} rows, "
            "padding included; those beyond were dropped. Give it more, or less uneven routing."
        )


@dataclass(eq=False)
class EPExpertOverflowError(EPOverflowError):
    """More tokens came to an expert under Megatron than the capacity factor gives it rows for.

    The rest was dropped. The buffer stays usable.

    Attributes:
        num_rows: Most tokens that came to it in one dispatch; of all experts the sum of these.
        capacity: Rows that it has, or all of them.
        layer: The layer's number in the model, from 1.
        rank: The rank that has the expert, among those that share the layer's experts.
        expert: Its number in the layer; with expert tensor parallelism that of its shard. None
            where all experts of the rank have their rows together.
        factor: Capacity factor that would have had room for all.
    """

    layer: int
    rank: int
    expert: int | None
    factor: float

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, rank {self.rank}: {self.num_rows} rows came to {self._whom} "
            f"{self.capacity}; the others were dropped. Raise "
            f"{setting('capacity_factor')} ({self.factor:.2f} would have had room for all), or "
            "balance the router."
        )

    @property
    def _whom(self) -> str:
        if self.expert is None:
            return "its experts, which together have"
        return f"expert {self.expert}, which has"


@dataclass(eq=False)
class EPTimeoutError(_WithFields, RuntimeError):
    """A bounded wait ran out. Names who waited for whom, and for what.

    Attributes:
        op: Operation that was running, such as ``"dispatch"``.
        phase: Part of the operation that waited, such as ``"header"``.
        rank: Group rank that waited.
        late_ranks: Group ranks that had not arrived; empty where the transport cannot tell.
        epoch: Number of the operation among those of its kind on this buffer, from 1, as in
            `Buffer.records`.
        timeout_s: Bound that ran out, in seconds.
        origin_ranks: Where the waiting began: for a late rank that had itself given up, the rank
            that it had waited for. Empty where nobody was asked.
    """

    op: str
    phase: str
    rank: int
    late_ranks: tuple[int, ...]
    epoch: int
    timeout_s: float
    origin_ranks: tuple[int, ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        late = _named(self.late_ranks) if self.late_ranks else "an unknown rank"
        return (
            f"{self.op} #{self.epoch}: rank {self.rank} waited {self.timeout_s:g} s for {late} "
            f"(phase: {self.phase}). {self._origin}{self._advice}{self._where}"
        )

    @property
    def _origin(self) -> str:
        if self.origin_ranks in ((), self.late_ranks):
            return ""
        return f"It began with {_named(self.origin_ranks)}, for which others had waited. "

    @property
    def _advice(self) -> str:
        if self.op in ("mask_rank", "clear_mask"):
            return (
                "Call it again on all ranks that are to go on; mask_rank without arguments masks "
                "those that do not come."
            )
        if self.op in ("stats", "trace"):
            return "The buffer is as before: call it again on all ranks."
        was = "There is no buffer" if self.op == "create" else "The buffer is no longer usable"
        options = ["build a new one on a group without the missing rank"]
        if self.op.startswith("low_latency"):
            options.insert(0, "call Buffer.mask_rank on all others of the host to go on without it")
        if not isinstance(self, EPLostRankError):
            options.append(f"raise {setting('timeout_s')} if the rank is only slow")
        return f"{was}; {', or '.join(options)}."


@dataclass(eq=False)
class EPLostRankError(EPTimeoutError):
    """A rank's connection has ended, as it does when its process dies: no point in waiting longer.

    Attributes:
        reason: What the transport says.
    """

    reason: str

    def __str__(self) -> str:
        return (
            f"{self.op} #{self.epoch}: rank {self.rank} lost the connection to "
            f"{_named(self.late_ranks)} (phase: {self.phase}): {self.reason}. "
            f"{self._origin}{self._advice}{self._where}"
        )


def _named(ranks: tuple[int, ...]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
