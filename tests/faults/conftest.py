"""``--faults-json FILE`` keeps what came of faults by force, as docs/results/ wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from table import Fault

from ep_comm.job.environment import surroundings
from ep_comm.job.files import write_json

_COLUMNS = ["rank 1", "over", "the others raise", "name", "within, s", "took, s"]
Keep = Callable[[Fault, float], None]


@pytest.fixture(scope="session")
def keep(request: pytest.FixtureRequest) -> Iterator[Keep]:
    """Call it with a fault that was as expected, and the longest time to an error."""
    rows: list[list[str]] = []

    def call(fault: Fault, took_s: float) -> None:
        what = f"{fault.what} {fault.place}".strip()
        error = [fault.error, f"rank {fault.culprit}", f"{fault.within_s:g}", f"{took_s:.1f}"]
        rows.append([what, fault.over, *(error if fault.error else ["nothing", "", "", ""])])

    yield call
    path = request.config.getoption("--faults-json")
    if path is None or not rows:
        return
    found = surroundings()
    gpus = found.pop("gpus")
    write_json(
        path,
        {
            "title": "Faults by force: what the other ranks raised, and how long that took",
            "source": "tests/faults/test_faults_by_force.py, expected and found",
            "machine": f"{len(gpus)} × {gpus[0]}" if gpus else "two CPU cores",
            **found,
            "tables": [{"columns": _COLUMNS, "rows": rows}],
        },
    )
