"""Every fault that is tried by force: what one rank does, and what is to come of it.

Written down before the runs. The tests are made from this table, and so is docs/reliability.md::

    python tests/faults/table.py docs/reliability.md
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

TRANSPORTS = {"gloo": "over gloo", "NVLink": "over NVLink", "network": "between hosts"}
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
        over: "gloo", "NVLink", or "network": between two hosts.
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
                *(("uses another Buffer",) if gloo else ()),
                *(("combines instead",) if gloo else ()),
                "has more room in low latency",
            )
        ),
        *([] if gloo else [fault("uses another Buffer", "", _LATE)]),
        *(
            [fault("loses its links", place, _LOST, place == BEFORE[2]) for place in BEFORE[::2]]
            if gloo
            else [fault("breaks its GPU", place, _LATE) for place in (BEFORE[0], BEFORE[2])]
        ),
    ]


def _faults_between_hosts() -> list[Fault]:
    """One of each kind: a pair of hosts takes a quarter of a minute to start."""

    def fault(what: str, place: str, error: str) -> Fault:
        return Fault(what=what, place=place, over="network", error=error)

    killed = ("before dispatch", "in dispatch", "before combine", "before low-latency dispatch")
    return [
        *(fault("is killed", place, _LATE) for place in killed),
        fault("stands still", "before dispatch", _LATE),
        fault("stands still for a second", "before combine", ""),
        fault("raises in its forward", "before experts", _LATE),
        fault("makes another Buffer", "", _DIFFERS),
        fault("dispatches other rows", "", _DIFFERS),
        fault("has more room in low latency", "", _DIFFERS),
    ]


FAULTS = [*_faults("gloo"), *_faults("NVLink"), *_faults_between_hosts()]


@dataclass(frozen=True)
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


_FAULTS, _MASKS, _RUNS = (
    "core/test_faults.py",
    "core/test_low_latency_masks.py",
    "faults/test_runs.py",
)
_REFUSALS, _RESUMED = "pretrain/test_example_refusals.py", "pretrain/test_resume.py"

OTHERS = [
    # ---- the library
    Other(
        "two of four ranks stay away",
        "both are named; the others go on in a new group",
        f"{_FAULTS}::test_two_absent_ranks_are_both_named",
    ),
    Other(
        "a rank has more tokens than the buffer",
        "all ranks name it, at once; the buffer lives",
        f"{_FAULTS}::test_too_many_tokens_on_one_rank_are_named_on_all",
    ),
    Other(
        "a rank makes no buffer",
        "it is named after the timeout",
        "job/test_meeting.py::test_a_rank_that_makes_no_buffer_is_named",
    ),
    Other(
        "a rank has no memory for a buffer",
        "all ranks name it",
        "backends/test_nvlink_memory.py::test_memory_that_one_rank_lacks_is_said_on_all",
    ),
    Other(
        "a rank is stopped, killed, or calls nothing, over NVLink",
        "`ep-comm explain` finds it in the files of the others",
        "telemetry/test_recorder_gpu.py::test_who_stayed_away_is_found_in_the_files",
    ),
    Other(
        "a rank destroys its buffer late, over NVLink",
        "the others wait so long, name it, and free nothing that it may write to",
        f"{_FAULTS}::test_destroy_waits_for_a_late_gpu_only_so_long",
    ),
    Other(
        "a link between hosts dies",
        "both ends name the other",
        "softnic/test_softnic.py::test_a_dead_link_is_named_in_time",
    ),
    Other(
        "a host stands still",
        "the other names it",
        "softnic/test_softnic.py::test_a_host_that_stands_still_is_named_in_time",
    ),
    Other(
        "a host does not answer `ep-comm doctor --network`",
        "it is named by host and rank",
        "softnic/test_hosts.py::test_the_command_names_a_silent_host_and_ends",
    ),
    Other(
        "a random rank is killed at a random time",
        "it is named by all, by the first alone; no hang, no orphan",
        "faults/test_random_kills.py::test_two_hundred_random_kills",
    ),
    # ---- low latency
    Other(
        "a rank is killed in a decode loop",
        "it is masked; the loop ends on the others, every value right",
        f"{_MASKS}::test_a_killed_rank_is_masked_and_the_decode_loop_goes_on",
    ),
    Other(
        "the same over NVLink",
        "the same",
        "backends/test_low_latency_masks_gpu.py"
        "::test_a_killed_gpu_is_masked_and_the_decode_loop_goes_on",
    ),
    Other(
        "a rank stands still in a decode loop, and goes on",
        "it is masked, finds out, comes back",
        f"{_MASKS}::test_a_stopped_rank_is_masked_and_comes_back",
    ),
    Other(
        "a rank goes while masks change",
        "it is named; the call can be made again",
        f"{_MASKS}::test_a_rank_that_goes_while_masks_change_is_named",
    ),
    # ---- runs
    Other(
        "a rank raises, runs out of memory, or is killed, in its forward",
        "torchrun's first failure is that rank; no process is left",
        f"{_RUNS}::test_a_rank_that_fails_in_its_forward_ends_the_run",
    ),
    Other(
        "a rank has another dispatcher",
        "it is named after `--ep-timeout`",
        f"{_RUNS}::test_a_rank_with_another_dispatcher_is_named",
    ),
    Other(
        "the disk is full at a checkpoint",
        "one line with `--save` and what is free; the checkpoint before it is whole",
        f"{_RUNS}::test_a_full_disk_keeps_the_checkpoint_before",
    ),
    Other(
        "the run is killed while it saves",
        "the checkpoint before it is the latest",
        "job/test_slurm.py::test_a_run_stopped_in_every_way_repeats_the_uninterrupted_one",
    ),
    Other(
        "a file of a checkpoint is cut, overwritten, or missing",
        "one line with the checkpoint, on all ranks",
        f"{_RUNS}::test_a_damaged_file_of_a_checkpoint",
    ),
    Other(
        "the checkpoint is another model's",
        "one line with what differs",
        f"{_RESUMED}::test_checkpoint_of_another_model",
    ),
    Other(
        "the data's index is cut, or no index, or of other data",
        "one line with the file",
        f"{_REFUSALS}::test_bad_data_and_folders",
    ),
    Other(
        "the configuration is cut, binary, or code",
        "one line with the file",
        "pretrain/test_config_files.py::test_a_file_that_is_no_configuration",
    ),
    Other(
        "a line of the log is damaged",
        "it is told; the others are read",
        "pretrain/test_run_log.py::test_damaged_lines_of_a_log",
    ),
    Other(
        "SIGTERM or SIGINT, to one rank or to all",
        "the step is finished and saved; exit code 75; the run goes on bit by bit",
        "job/test_slurm.py::test_a_run_stopped_in_every_way_repeats_the_uninterrupted_one",
    ),
    Other(
        "SIGUSR1 or SIGHUP, to one rank",
        "the same",
        f"{_RUNS}::test_a_signal_to_one_rank_saves_and_ends_all",
    ),
    Other(
        "two jobs with one port",
        "the second ends with one line a rank; the first does not notice",
        f"{_RUNS}::test_a_second_job_on_a_port_leaves_the_first_alone",
    ),
    Other(
        "two runs in one folder",
        "the second ends with one line that names the first",
        f"{_RESUMED}::test_two_runs_in_one_folder",
    ),
]

_BLOCK = re.compile(r"(<!-- faults: (\w+) -->\n).*?(<!-- end -->)", re.S)


def by_force() -> list[list[str]]:
    """Return a row for each kind of fault: where it is tried, and what the others raise."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for fault in FAULTS:
        over = rows.setdefault((fault.what, fault.error), {name: [] for name in TRANSPORTS})
        over[fault.over].append(fault.place or "its next call")
    return [
        [
            what,
            f"`{error}`, rank {VICTIM}" if error else "no error; all go on",
            *("; ".join(over[name]) or "–" for name in TRANSPORTS),
        ]
        for (what, error), over in rows.items()
    ]


def write_page(text: str) -> str:
    """Return the page with its tables as they are here."""
    tables = {
        "force": (["rank 1", "the others", *TRANSPORTS.values()], by_force()),
        "others": (
            ["fault", "what comes of it", "test"],
            [[each.what, each.outcome, f"`{each.test}`"] for each in OTHERS],
        ),
    }

    def table(match: re.Match[str]) -> str:
        columns, rows = tables[match[2]]
        lines = [
            "| " + " | ".join(cells) + " |\n" for cells in (columns, ["---"] * len(columns), *rows)
        ]
        return match[1] + "".join(lines) + match[3]

    return _BLOCK.sub(table, text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(write_page(page.read_text()))
