"""Trainings whose ranks take themselves for several hosts, and what their layers hand on."""

from __future__ import annotations

import socket
from functools import partial

import numpy as np
import pytest
from launch_runs import need_megatron
from megatron_model import Setup, train
from ranks import run_ranks

from ep_comm.backends.nvlink.support import Facts
from ep_comm.errors import EPArgumentError, EPUnsupportedError
from ep_comm.megatron import EPOptions

need_megatron()


def train_on_two_hosts(rank: int, uneven: bool) -> str:
    """What a training says whose ranks are on hosts of two, the last on one of its own if uneven.

    The GPUs are not there, nor is NVSHMEM.
    """
    from ep_comm import _native
    from ep_comm.backends import NodesBackend

    facts = Facts(f"GPU-{rank}", (), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "load_nvshmem", lambda: None)
        patch.setattr(_native, "nvshmem_unusable_reason", lambda: "it is not installed")
        patch.setattr(socket, "gethostname", lambda: "abc"[rank // 2 + (uneven and rank == 3)])
        patch.setattr(NodesBackend, "facts", lambda group, config: facts)
        with pytest.raises((EPUnsupportedError, EPArgumentError)) as caught:
            train(rank, Setup(steps=1, ep=4))
    return str(caught.value)


def test_experts_across_hosts_need_equal_hosts_and_nvshmem():
    """The layers are built; the first dispatch, which makes the buffer, says what is missing."""
    for text in run_ranks(4, train_on_two_hosts, False, pool="launch"):
        assert "the group spans hosts, and rank 0 cannot use NVSHMEM: it is not installed" in text
    for text in run_ranks(4, train_on_two_hosts, True, pool="launch"):
        assert "host a has 2 ranks of the group, host b has 1" in text


def train_on_one_or_two_hosts(rank: int, split: int) -> tuple:
    """Losses of two steps, ranks from `split` on being on another host."""
    from ep_comm.backends.reference.backend import ReferenceBackend
    from ep_comm.megatron import destroy_buffers  # megatron.core comes with it

    nodes = []
    original = ReferenceBackend.set_num_sms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "ab"[rank >= split])
        patch.setattr(
            ReferenceBackend,
            "set_num_sms",
            lambda self, sms: (nodes.append(self.config.ranks_per_node), original(self, sms)),
        )
        losses = train(rank, Setup(steps=2, ep=4))["losses"]
        destroy_buffers()
    return losses, nodes


def test_experts_across_hosts_train_on_the_cpu():
    """With the sums of a node rounded first; the losses are those of one host up to that."""
    together, apart = (
        run_ranks(4, train_on_one_or_two_hosts, split, pool="launch") for split in (4, 2)
    )
    assert together[0][1] == [None] and apart[0][1] == [2]
    np.testing.assert_allclose(apart[0][0], together[0][0], rtol=1e-4)


def buffer_of_the_options(rank: int, **options: object) -> list[tuple]:
    """What each buffer of a training was made with."""
    from ep_comm.backends.reference.backend import ReferenceBackend

    made = []
    original = ReferenceBackend.set_num_sms
    ReferenceBackend.set_num_sms = lambda self, num_sms: made.append(
        (num_sms, self.config.max_tokens_per_rank, self.config.timeout_s)
    )
    try:
        train(rank, Setup(steps=1, options=tuple(options.items())))
    finally:
        ReferenceBackend.set_num_sms = original
    return made


def test_layers_hand_on_their_options():
    options = dict(num_sms=24, max_tokens_per_rank=777, timeout_s=11.0)
    made = run_ranks(2, partial(buffer_of_the_options, **options), pool="launch")
    assert made == [[(24, 777, 11.0)]] * 2


@pytest.mark.parametrize("num_sms", [1, 0, -3, 2.5])
def test_num_sms_of_the_options_is_checked(num_sms):
    with pytest.raises(EPArgumentError, match="num_sms must be at least 2"):
        EPOptions(num_sms=num_sms)
