"""The table of docs/network.md, made from the settings.

``python -m ep_comm.network.tables docs/network.md`` puts the current one into the page, between
the comments ``<!-- table: settings -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ep_comm.network.settings import VARIABLES
from ep_comm.network.variables import Variable


def settings_table() -> str:
    """Return a line for each setting."""
    header = ("field", "variable `NVSHMEM_...`", "allowed", "default", "what it does")
    rows = [
        (f"`{each.field}`", f"`{each.name}`", each.kind.allowed, _default(each), each.help)
        for each in VARIABLES
    ]
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_table(page: str) -> str:
    """Return the text of a page with its table made anew."""
    return re.sub(
        r"(?<=<!-- table: settings -->\n).*?(?=<!-- end -->)",
        lambda _: settings_table(),
        page,
        flags=re.DOTALL,
    )


def _default(each: Variable) -> str:
    ours = "NVSHMEM's choice" if each.default is None else each.kind.show(each.default)
    if each.field == "map_nics":
        ours = "on where one of the lists is given"
    unit = f" {each.unit}" if each.unit and ours.isdigit() else ""
    return f"{ours}{unit}" + (f" (NVSHMEM: {each.theirs})" if each.theirs else "")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
