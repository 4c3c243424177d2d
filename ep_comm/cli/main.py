"""The ``ep-comm`` command, also ``python -m ep_comm``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the packages of the ``cli`` extra, what does without them."""
    try:
        from ep_comm.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ep_comm":
            raise
        _bare(sys.argv[1:], missing=error.name)
    else:
        app()


def _bare(arguments: list[str], *, missing: str | None) -> None:
    if arguments == ["--version"]:
        from ep_comm.version import __version__

        print(__version__)
    elif arguments == ["doctor"]:
        from ep_comm.cli.doctor import diagnose

        print(diagnose())
    else:
        sys.exit(f"error: {missing} is missing: pip install 'ep_comm[cli]'; doctor does without")
