"""The kernel of column-wise copies, run on the CPU."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from emulated_nodes import EmulatedLibrary
from fp8_columnwise_cases import GROUPS, by_hand, check_same, received

from ep_comm import _native, fp8


@pytest.mark.parametrize("groups", GROUPS)
def test_kernel_gives_the_reference_bits(library, groups):
    native = EmulatedLibrary(library)
    rows, scales, ends = received(groups, hidden=256)
    with (
        mock.patch.object(_native, "load_for", lambda _: native),
        mock.patch.object(torch.cuda, "device", mock.MagicMock()),
        mock.patch.object(torch.cuda, "current_stream", lambda: mock.Mock(cuda_stream=1)),
    ):
        got = fp8.columnwise(rows, scales, groups, ends)
        native.synchronize(1)
    check_same(got, by_hand(rows, scales, ends.tolist()))


def test_tiles_that_the_host_counted_too_many_are_left_alone(library):
    """Where the device has dropped rows since: what is behind its groups is not written to."""
    native = EmulatedLibrary(library)
    rows, scales, ends = received((144, 16), hidden=128)
    fewer = ends.clone()
    fewer[2] = fewer[1]
    with (
        mock.patch.object(_native, "load_for", lambda _: native),
        mock.patch.object(torch.cuda, "device", mock.MagicMock()),
        mock.patch.object(torch.cuda, "current_stream", lambda: mock.Mock(cuda_stream=1)),
        mock.patch.object(torch, "empty", torch.zeros),
    ):
        got = fp8.columnwise(rows, scales, (144, 16), fewer)
        native.synchronize(1)
    check_same(got[:1], by_hand(rows, scales, ends.tolist())[:1])
    assert all(not each.view(torch.uint8).any() for each in itertools.chain(got[1]))
