"""What the scalars of a training run mean, and what to do when one of them is high.

One source: the table of docs/recorder.md is made from it, and ``ep-comm report`` says the same.
``python -m ep_comm.telemetry.advice docs/recorder.md`` puts the table into the page.
"""

from __future__ import annotations

from typing import NamedTuple

from ep_comm import markdown

HIGH_WAIT_SHARE = 0.2
LATE_RANK = (
    "look at that rank's input pipeline, its GPU's clocks and temperature, other programs on its "
    "host"
)
OVERLAP = "set `--ep-overlap-wgrad`"
FP8 = "put FP8 on the wire"
WAIT_LESS = "get `ep/wait-share` down"


class Scalar(NamedTuple):
    """A scalar, or several that are read alike.

    Attributes:
        names: As logs have them.
        unit: Empty for a ratio.
        meaning: In words.
        when_high: What to do then, or what it says.
    """

    names: tuple[str, ...]
    unit: str
    meaning: str
    when_high: str


TIMES = Scalar(
    ("ep/dispatch-ms", "ep/combine-ms"),
    "ms",
    "forward time of a step, over all layers and micro-batches; permutation and padding are in it, "
    "and waits",
    "with a high `ep/wait-share`: look for the late rank. Else compare with `ep-comm bench`",
)
EXPERTS = Scalar(
    ("ep/expert-ms",),
    "ms",
    "the same of the experts' GEMMs",
    "with a high `ep/imbalance-rank`: the router. Else that is your model",
)
TAILS = Scalar(
    ("ep/dispatch-ms-p99", "ep/combine-ms-p99"),
    "ms",
    "99th percentile of one operation, forward and backward; of fewer than a hundred near the "
    "longest",
    "one operation of many is late: `stats()` says whom it waited for",
)
WAIT_SHARE = Scalar(
    ("ep/wait-share",),
    "",
    "part of the operations' time that they waited for other ranks",
    f"over {HIGH_WAIT_SHARE:g} the ranks do not arrive together: look at `ep/slowest-rank`, then "
    "at `ep/imbalance-rank`",
)
SLOWEST = Scalar(
    ("ep/slowest-rank",),
    "rank of the job",
    "who was waited for longest, over all ranks; -1: nobody",
    f"always the same number: {LATE_RANK}. Changing: uneven tokens, or chance",
)
EXPOSED = Scalar(
    ("ep/exposed-ms",),
    "ms",
    "time of a step in which an operation ran with no weight gradient beside it, waits included",
    f"{OVERLAP}; {FP8}; {WAIT_LESS}",
)
IMBALANCE = Scalar(
    ("ep/imbalance-rank", "ep/imbalance-expert"),
    "",
    "tokens of the fullest rank (expert) over the mean, in the layer where that is worst; 1 is "
    "even",
    "look at the router: its balance loss, its bias, or a capacity. `ep/balance` says which layer "
    "and expert",
)
WIRE = Scalar(
    ("ep/wire-mib",),
    "MiB",
    "payload that left a rank, forward and backward",
    f"{FP8}; choose fewer experts a token, or groups of experts",
)
DROPPED = Scalar(
    ("ep/dropped-share", "ep/capacity-needed"),
    "",
    "with `--ep-capacity-factor`: tokens that experts had no rows for, of all that came to "
    "experts; and the factor that would have had rows for all",
    "raise `--ep-capacity-factor` towards `ep/capacity-needed`, or balance the router",
)
SCALARS = (TIMES, EXPERTS, TAILS, WAIT_SHARE, SLOWEST, EXPOSED, IMBALANCE, WIRE, DROPPED)


def scalars_table() -> list[str]:
    """Return a line for each scalar."""
    header = ("scalar", "unit", "meaning", "when it is high")
    rows = [(", ".join(f"`{name}`" for name in each.names), *each[1:]) for each in SCALARS]
    return markdown.table(header, rows)


TABLES = {"scalars": scalars_table}

if __name__ == "__main__":
    markdown.renew_page(TABLES)
