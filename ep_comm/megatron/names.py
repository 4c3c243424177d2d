"""The names of dispatchers.

Our own is printed as ``ep_comm``. On command lines and in configurations it is ``deepep`` too.
Megatron's DeepEP is another one: the library of that name, under Megatron's flex dispatcher. It is
printed as ``flex-deepep``.
"""

from __future__ import annotations

NAME = "ep_comm"
VALUES = ("deepep", NAME)  # what flags and configurations accept for it

# Megatron validates other features against this dispatcher of its own. Ours then takes its place.
STOCK = "alltoall"


def is_ep_comm(dispatcher: str | None) -> bool:
    """Return whether a flag or a configuration asks for our dispatcher."""
    return dispatcher in VALUES


def printed(dispatcher: str) -> str:
    """Return the name under which a dispatcher appears in logs and tables."""
    return NAME if is_ep_comm(dispatcher) else dispatcher
