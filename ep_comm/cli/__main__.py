"""``python -m ep_comm.cli``: the ``ep-comm`` command."""

from ep_comm.cli.main import main

if __name__ == "__main__":
    main()
