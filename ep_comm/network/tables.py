"""The table of docs/network.md, made from the settings.

``python -m ep_comm.network.tables docs/network.md`` puts the current one into the page.
"""

from __future__ import annotations

from ep_comm import markdown
from ep_comm.network.settings import VARIABLES
from ep_comm.network.variables import Variable


def settings_table() -> list[str]:
    """Return a line for each setting."""
    header = ("field", "variable `NVSHMEM_...`", "allowed", "default", "what it does")
    rows = [
        (f"`{each.field}`", f"`{each.name}`", each.kind.allowed, _default(each), each.help)
        for each in VARIABLES
    ]
    return markdown.table(header, rows)


def _default(each: Variable) -> str:
    ours = "NVSHMEM's choice" if each.default is None else each.kind.show(each.default)
    if each.field == "map_nics":
        ours = "on where one of the lists is given"
    unit = f" {each.unit}" if each.unit and ours.isdigit() else ""
    return f"{ours}{unit}" + (f" (NVSHMEM: {each.theirs})" if each.theirs else "")


TABLES = {"settings": settings_table}

if __name__ == "__main__":
    markdown.renew_page(TABLES)
