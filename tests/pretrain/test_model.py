"""What a model says of the backend that it has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("pydantic")

from ranks import run_ranks  # noqa: E402


@pytest.mark.parametrize(
    ("has_gpu", "passed_over", "words"),
    [
        (True, {"nvlink": "no peer access"}, "reference backend, which is slow (nvlink: no peer"),
        (True, {}, None),
        (False, {"nvlink": "there is no GPU"}, None),
    ],
    ids=["on GPUs", "nothing passed over", "on the CPU"],
)
def test_a_slow_backend_is_told_of_on_gpus(has_gpu, passed_over, words):
    ((before, after),) = run_ranks(1, told_before_and_after_a_buffer, has_gpu, passed_over)
    assert before is None
    assert after is None if words is None else words in after


def told_before_and_after_a_buffer(rank: int, has_gpu: bool, passed_over: dict[str, str]) -> tuple:
    from ep_comm.pretrain.start import prepare_megatron

    prepare_megatron()
    from ep_comm.pretrain import model

    layer = SimpleNamespace(token_dispatcher=SimpleNamespace())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        patch.setattr(model, "moe_layers", lambda chunks: [("mlp", layer)])
        before = model.slow_backend(SimpleNamespace(model=None))
        layer.token_dispatcher.buffer = SimpleNamespace(passed_over=passed_over)
        return before, model.slow_backend(SimpleNamespace(model=None))
