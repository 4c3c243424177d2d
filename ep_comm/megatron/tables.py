"""The tables of docs/megatron.md, made from the code.

``python -m ep_comm.megatron.tables docs/megatron.md`` puts the current ones into the page.
"""

from __future__ import annotations

import re

from ep_comm import markdown
from ep_comm.megatron.options import OPTIONS
from ep_comm.megatron.support import REFUSALS


def options_table() -> list[str]:
    """Return a line for each flag of the dispatcher."""
    rows = [
        (f"{each.flag} {each.metavar}" if each.metavar else each.flag, each.full_help)
        for each in OPTIONS
    ]
    return markdown.table(("flag", ""), [(f"`{flag}`", _code(text)) for flag, text in rows])


def refusals_table() -> list[str]:
    """Return a line for each thing that does not work with the dispatcher."""
    rows = [(_code(each.what), _code(each.why or "not there yet")) for each in REFUSALS]
    return markdown.table(("not supported", "why, or what to do instead"), rows)


TABLES = {"options": options_table, "refusals": refusals_table}


def _code(text: str) -> str:
    """Mark flags, identifiers and quoted values as code."""
    return re.sub(r"--[a-z0-9-]*[a-z0-9]|\w+_\w+(='\w+')?|'\w+'", r"`\g<0>`", text)


if __name__ == "__main__":
    markdown.renew_page(TABLES)
