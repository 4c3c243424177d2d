"""The ``ep-comm`` command, also ``python -m ep_comm.cli``, see `main`."""
