"""The text for Prometheus: each line as its format wants it, with the values of `Stats`."""

from __future__ import annotations

import re

import pytest

from ep_comm.telemetry.prometheus import prometheus_text
from ep_comm.telemetry.records import Interval, OpRecord
from ep_comm.telemetry.stats import summarize

LINE = re.compile(r'(ep_comm_\w+)\{((?:\w+="[^"\\]*",?)+)\} (-?[0-9.e+-]+)')


def read(text: str) -> dict[tuple[str, frozenset], float]:
    values = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        found = LINE.fullmatch(line)
        assert found, line
        labels = frozenset(re.findall(r'(\w+)="([^"]*)"', found[2]))
        assert (found[1], labels) not in values  # Prometheus refuses the page then
        values[found[1], labels] = float(found[3])
    return values


def test_values_and_labels():
    records = [
        OpRecord(
            op=op, epoch=i, place=i, wait_s_by_rank=(0.0, 0.1 * i), rows_to_rank=(1, 3),
            rows_of_experts=(1, 2, 6) if op == "dispatch" else (),
            wire_bytes_to_rank=(0, 48), called_s=float(i), is_backward=i > 2,
            span=Interval(0.5 * i),
        )
        for i, op in enumerate(["dispatch", "combine", "dispatch"], 1)
    ]  # fmt: skip
    stats = summarize(records, 0, 2)
    text = prometheus_text(stats)
    names = re.findall(r"^# TYPE (\w+) gauge$", text, re.M)
    assert len(names) == len(set(names)) == 8
    values = read(text)
    assert {name for name, _ in values} == set(names)

    def value(name: str, **labels: str) -> float:
        return values[f"ep_comm_{name}", frozenset({"rank": "0", **labels}.items())]

    assert value("operation_seconds", kind="combine", quantile="0.5") == 1.0
    assert value("operation_seconds", kind="dispatch of backward", quantile="1") == 1.5
    assert value("wait_seconds", kind="combine", late_rank="1", quantile="0.99") == pytest.approx(
        0.2
    )
    assert value("operations", kind="dispatch") == 1
    assert value("wire_bytes", kind="dispatch") == 48
    assert value("row_imbalance", kind="dispatch") == 1.5
    assert value("expert_imbalance", kind="dispatch") == 2
    assert value("wait_share") == pytest.approx(0.2)
    assert value("slowest_rank") == 1


def test_nothing_has_been_done_yet():
    values = read(prometheus_text(summarize([], 3, 2)))
    assert values == {
        ("ep_comm_wait_share", frozenset({("rank", "3")})): 0.0,
        ("ep_comm_slowest_rank", frozenset({("rank", "3")})): -1.0,
    }
