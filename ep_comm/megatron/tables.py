"""The tables of docs/megatron.md, made from the code.

``python -m ep_comm.megatron.tables docs/megatron.md`` puts the current ones into the page, each
between the comments ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ep_comm.megatron.options import OPTIONS
from ep_comm.megatron.support import REFUSALS


def options_table() -> str:
    """Return a line for each flag of the dispatcher."""
    rows = [
        (f"{each.flag} {each.metavar}" if each.metavar else each.flag, each.full_help)
        for each in OPTIONS
    ]
    return _table(("flag", ""), [(f"`{flag}`", _code(text)) for flag, text in rows])


def refusals_table() -> str:
    """Return a line for each thing that does not work with the dispatcher."""
    rows = [(_code(each.what), _code(each.why or "not there yet")) for each in REFUSALS]
    return _table(("not supported", "why, or what to do instead"), rows)


TABLES = {"options": options_table, "refusals": refusals_table}


def with_tables(page: str) -> str:
    """Return the text of a page with its tables made anew.

    Raises:
        KeyError: It has a place for a table that there is not.
    """
    return re.sub(
        r"(?<=<!-- table: )(\w+) -->\n.*?<!-- end -->",
        lambda match: f"{match[1]} -->\n{TABLES[match[1]]()}<!-- end -->",
        page,
        flags=re.DOTALL,
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    """Mark flags, identifiers and quoted values as code."""
    return re.sub(r"--[a-z0-9-]*[a-z0-9]|\w+_\w+(='\w+')?|'\w+'", r"`\g<0>`", text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(with_tables(page.read_text()))
