"""The constants that the model rests on, each with its source."""

from __future__ import annotations

from typing import NamedTuple


class Fact(NamedTuple):
    """A constant of the model.

    Attributes:
        value: As `unit` says.
        unit: "GB/s" is 10^9 bytes a second.
        what: What it is.
        source: Where it is from.
    """

    value: float
    unit: str
    what: str
    source: str


NVLINK_SHARE = Fact(
    0.74,
    "of the nominal rate",
    "NVLink carries of whole rows, all GPUs at once",
    "332 to 343 of 450 GB/s: plain bulk pushes, in each run of `ep-comm bench`",
)
NIC_SHARE = Fact(
    0.90,
    "of the nominal rate",
    "a network card carries of whole rows, all GPUs at once",
    "DeepEP's published figures, rows that stay on the node taken out: 41 to 46 of 50 GB/s",
)
PUSH_SM = Fact(
    48,
    "GB/s an SM",
    "an SM pushes over NVLink",
    "4 H200s: 48 an SM, up to six SMs",
)
STORE_SM = Fact(
    55,
    "GB/s an SM",
    "an SM stores while it copies rows",
    "one H200: 55 to 62 ([notes](kernel-notes.md#dispatch-with-few-sms-what-an-sm-can-store))",
)
STORE_FP8_SM = Fact(
    34,
    "GB/s an SM",
    "the same of FP8 rows of hidden 7168 with their scales; short rows are slower",
    "`h200-x4-w1`, 24 SMs, of which 16 expand: 242 MB in 447 µs",
)
READ_SM = Fact(
    60,
    "GB/s an SM",
    "an SM reads rows that it sums",
    "`h200-x4-w1-16-sms`: a combine reads 682 MB in 675 µs",
)
MEMORY = Fact(
    4300,
    "GB/s",
    "a GPU's memory reads and writes, together",
    "a local copy on an H200",
)
DISPATCH_US = Fact(
    30,
    "µs",
    "a dispatch takes beyond its busiest resource: launch, first rows, last rows",
    "−2 to 49 in the runs below: known routing, BF16, all SMs",
)
COMBINE_US = Fact(
    5,
    "µs",
    "the same of a combine",
    "−12 to 32 in the runs below: all SMs",
)
NEW_ROUTING_US = Fact(
    40,
    "µs",
    "a new routing adds",
    "27 to 72 in the runs below on four and eight GPUs, all SMs",
)
EXPAND_WAIT_US = Fact(
    110,
    "µs",
    "passes in a new routing before rows are expanded: the host learns how many there are",
    "`h200-x4-w1`, 24 SMs: 141 longer than a known routing, where all SMs are 34 longer",
)
NVLINK_LATENCY = Fact(1.2, "µs", "a flag takes over NVLink", "4 H200s")
NIC_LATENCY = Fact(
    5,
    "µs",
    "a message and its flag take over the network",
    "assumed: no network card was here",
)
FACTS = (
    NVLINK_SHARE, NIC_SHARE, PUSH_SM, STORE_SM, STORE_FP8_SM, READ_SM, MEMORY, DISPATCH_US,
    COMBINE_US, NEW_ROUTING_US, EXPAND_WAIT_US, NVLINK_LATENCY, NIC_LATENCY,
)  # fmt: skip

# Of an H100 or H200.
NVLINK_GB_PER_S = 450.0
NIC_GB_PER_S = 50.0
GPU_SMS = 132
