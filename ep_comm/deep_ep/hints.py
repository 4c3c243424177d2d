"""What a program may say of a `Buffer` in its environment, for DeepEP's constructor cannot.

The variables reach spawned workers. They must be equal on all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, get_args

from ep_comm.config import BackendName, check_positive, check_timeout
from ep_comm.errors import EPArgumentError

MAX_TOKENS_VARIABLE = "EP_COMM_DEEP_EP_MAX_TOKENS"
TIMEOUT_VARIABLE = "EP_COMM_DEEP_EP_TIMEOUT_S"
BACKEND_VARIABLE = "EP_COMM_DEEP_EP_BACKEND"


@dataclass(frozen=True, kw_only=True)
class Hints:
    """See the fields of `ep_comm.EPConfig`.

    Attributes:
        max_tokens_per_rank: Most tokens that a rank passes to one dispatch. None: as many as the
            first one has, on the rank that has the most; more are made room for when they come.
        timeout_s: Bound of every wait, in seconds; DeepEP's by default.
        backend: Which one to use.
    """

    max_tokens_per_rank: int | None = None
    timeout_s: float = 100.0
    backend: BackendName = "auto"

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, *, timeout_s: float = timeout_s
    ) -> Hints:
        """Return those that are set.

        Args:
            environment: Where they are; None is the process's.
            timeout_s: The bound where it is not set there.

        Raises:
            EPArgumentError: One is set to what it cannot be; names the variable.
        """
        given = os.environ if environment is None else environment
        tokens, timeout = given.get(MAX_TOKENS_VARIABLE), given.get(TIMEOUT_VARIABLE)
        backend = given.get(BACKEND_VARIABLE, "auto")
        if backend not in get_args(BackendName):
            names = ", ".join(get_args(BackendName))
            raise EPArgumentError(f"{BACKEND_VARIABLE} must be one of {names}, got {backend!r}")
        try:
            hints = cls(
                max_tokens_per_rank=int(tokens) if tokens else None,
                timeout_s=float(timeout) if timeout else timeout_s,
                backend=cast(BackendName, backend),
            )
            if hints.max_tokens_per_rank is not None:
                check_positive("the number of tokens", hints.max_tokens_per_rank)
            check_timeout(hints.timeout_s)
        except ValueError as error:  # EPArgumentError is one
            raise EPArgumentError(
                f"{MAX_TOKENS_VARIABLE}={tokens} or {TIMEOUT_VARIABLE}={timeout}: {error}"
            ) from error
        return hints
