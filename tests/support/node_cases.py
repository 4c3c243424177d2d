"""Cases between nodes for kernels on the CPU."""

from __future__ import annotations

from cases import Case

PATIENT = dict(timeout_s=120)  # of a CPU that has other things to do
TOKENS = (9, 0, 70, 30, 1, 41, 5, 8)


def case_of(shape: tuple[int, int], **changes) -> Case:
    sizes = dict(
        tokens=TOKENS[: shape[0] * shape[1]],
        ranks_per_node=shape[1],
        hidden=24,
        num_topk=2 if shape[0] * shape[1] < 4 else 5,
        experts_per_rank=2,
        drop=0.1,
    )
    return Case(**{**sizes, **changes})
