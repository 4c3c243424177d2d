"""``python -m ep_comm.deep_ep --path``."""

from __future__ import annotations

import argparse
import sys

from ep_comm.deep_ep import naming


def main() -> None:
    """Print the folder; say it where DeepEP is installed."""
    parser = argparse.ArgumentParser(
        prog="python -m ep_comm.deep_ep",
        description="Let programs that import deep_ep run on ep_comm.",
        epilog='PYTHONPATH="$(python -m ep_comm.deep_ep --path):$PYTHONPATH" python program.py',
    )
    parser.add_argument(
        "--path", action="store_true", required=True, help="print the folder for PYTHONPATH"
    )
    parser.parse_args()
    print(naming.path())
    other = naming.installed()
    if other is not None:
        print(f"DeepEP is installed, {other.origin}: this would hide it", file=sys.stderr)


if __name__ == "__main__":
    main()
