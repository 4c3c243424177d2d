"""With deterministic algorithms torch fills new memory with NaN: never over rows that came."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from ep_comm import Buffer, EPConfig

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, EXPERTS, TOPK = 4096, 4096, 32, 8
CONFIG = EPConfig(
    num_experts=EXPERTS, hidden=HIDDEN, max_tokens_per_rank=TOKENS, num_topk=TOPK, backend="nvlink"
)


def dispatch_twice(rank: int, layout: str, asynchronous: bool) -> None:
    torch.manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    weights, topk_idx = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOPK)

    def received() -> tuple[torch.Tensor, torch.Tensor]:
        out = buffer.dispatch(x, topk_idx, weights, layout=layout, async_finish=asynchronous)
        out.event.current_stream_wait()
        return out.recv_x, out.recv_topk_weights

    with Buffer(None, CONFIG) as buffer:
        want = received()
        torch.use_deterministic_algorithms(True)
        try:
            for _ in range(5):
                assert all(map(torch.equal, received(), want))
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_rows_are_written_behind_the_fill(layout, asynchronous):
    run_ranks(1, dispatch_twice, layout, asynchronous, backend="nccl")
