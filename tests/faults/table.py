"""Every fault that is tried by force: what one rank does, and what is to come of it.

Written down before the runs. The tests are made from this table, and so is docs/reliability.md::

    python tests/faults/table.py docs/reliability.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VICTIM = 1  # rank that the fault happens to
TIMEOUT_S = 2.0  # EPConfig(timeout_s=...) in these runs
SLACK_S = 5.0  # an error comes within the timeout and this

# Where in a step of `acts.step` the victim acts. "in" is between the messages of an operation.
BEFORE = (
    "before dispatch",
    "before experts",
    "before combine",
    "before backward",
    "before low-latency dispatch",
    "before low-latency combine",
)
INSIDE = (
    "in routing of plan",
    "in rows of dispatch",
    "in rows of combine",
    "in rows of low_latency_dispatch",
    "in rows of low_latency_combine",
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, on one kind of transport.

    Attributes:
        what: What the victim does or what happens to it; a function of `acts`.
        place: Where in the step; "" where `what` says it.
        over: "gloo" or "NVLink".
        error: What the other ranks raise; "" where they go on as if nothing had happened.
        in_ci: Whether every run of the tests has it, as one of its kind.
    """

    what: str
    place: str
    over: str
    error: str
    in_ci: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.over, self.what, self.place))).replace(" ", "-")

    @property
    def culprit(self) -> int | None:
        """The rank that every other one is to name."""
        return VICTIM if self.error else None

    @property
    def within_s(self) -> float:
        """The longest time from the fault to an error on every other rank."""
        return TIMEOUT_S + SLACK_S


_LATE, _LOST, _DIFFERS = "EPTimeoutError", "EPLostRankError", "EPMismatchError"


def _faults(over: str) -> list[Fault]:
    gloo = over == "gloo"
    # NVLink carries no end of a process: its kernels wait until the timeout.
    dead = _LOST if gloo else _LATE
    inside = INSIDE if gloo else ("in dispatch", "in combine", "in low-latency dispatch")
    always = {"before combine", "in rows of dispatch"} if gloo else set()

    def fault(what: str, place: str, error: str, in_ci: bool = False) -> Fault:
        return Fault(what=what, place=place, over=over, error=error, in_ci=in_ci and gloo)

    return [
        fault("is killed", "before Buffer", _LATE),
        *(fault("is killed", place, dead, place in always) for place in (*BEFORE, *inside)),
        fault("stands still", "before dispatch", _LATE, in_ci=True),
        *(fault("stands still", place, _LATE) for place in (*BEFORE[2:5], *inside[1:2])),
        fault("stands still for a second", "before dispatch", "", in_ci=True),
        *(fault("stands still for a second", place, "") for place in (BEFORE[2], *inside[1:2])),
        fault("raises in its forward", "before experts", _LATE, in_ci=True),
        fault("raises in its forward", "before backward", _LATE),
        fault("runs out of memory", "before experts", _LATE, in_ci=True),
        *(
            fault(what, "", _DIFFERS, what == "dispatches other rows")
            for what in (
                "makes another Buffer",
                "aligns otherwise",
                "has the other layout",
                "has fewer experts a token",
                "dispatches other rows",
                "sends probabilities",
                "combines another handle",
                "uses another Buffer",
                *(("combines instead",) if gloo else ()),
                "has more room in low latency",
            )
        ),
        *(
            [fault("loses its links", place, _LOST, place == BEFORE[2]) for place in BEFORE[::2]]
            if gloo
            else [fault("breaks its GPU", place, _LATE) for place in (BEFORE[0], BEFORE[2])]
        ),
    ]


FAULTS = [*_faults("gloo"), *_faults("NVLink")]


@dataclass(frozen=True, kw_only=True)
class Other:
    """A fault that a test of its own is for.

    Attributes:
        what: What happens.
        outcome: What comes of it, and who is named.
        test: Its file below tests/, and its name.
    """

    what: str
    outcome: str
    test: str


OTHERS = [
    Other(what=what, outcome=outcome, test=test)
    for what, outcome, test in (
        # ---- the library
        (
            "two of four ranks stay away",
            "both are named, and the others go on in a new group",
            "core/test_faults.py::test_two_absent_ranks_are_both_named",
        ),
        (
            "a rank has more tokens than the buffer",
            "all ranks name it, at once; the buffer lives",
            "core/test_faults.py::test_too_many_tokens_on_one_rank_are_named_on_all",
        ),
        (
            "a rank goes while masks change",
            "it is named; the call can be made again",
            "core/test_low_latency_masks.py::test_a_rank_that_goes_while_masks_change_is_named",
        ),
        (
            "a rank of low latency is killed",
            "it is masked, the decode loop ends on the others, every value right",
            "core/test_low_latency_masks.py::"
            "test_a_killed_rank_is_masked_and_the_decode_loop_goes_on",
        ),
        (
            "a rank of low latency stands still, and goes on",
            "it is masked, finds out, and comes back",
            "core/test_low_latency_masks.py::test_a_stopped_rank_is_masked_and_comes_back",
        ),
        (
            "the same over NVLink",
            "the same",
            "backends/test_low_latency_masks_gpu.py::test_a_killed_rank_is_masked_on_gpus",
        ),
        (
            "a rank makes no buffer",
            "it is named after the timeout",
            "job/test_meeting.py::test_a_rank_that_makes_no_buffer_is_named",
        ),
        (
            "a rank has no memory for a buffer",
            "all ranks name it",
            "backends/test_nvlink_memory.py::test_out_of_memory_on_one_rank_is_raised_on_all",
        ),
        (
            "a link between hosts dies",
            "both ends name the other within the timeout and 5 s",
            "softnic/test_softnic.py::test_a_dead_link_is_named_in_time",
        ),
        (
            "a host does not answer ep-comm doctor --network",
            "it is named by host and rank",
            "softnic/test_hosts.py::test_the_command_names_a_silent_host_and_ends",
        ),
    )
]
