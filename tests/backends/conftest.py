"""An NVLink backend without a GPU, which keeps what it launches."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from nvlink_launches import CONFIG, CURRENT, make_backend

from ep_comm.backends.nvlink import streams as nvlink_streams


@pytest.fixture
def backend(request):
    with (
        mock.patch.object(nvlink_streams, "raw_stream", lambda _: CURRENT),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(nvlink_streams, "EventOverlap", lambda *args: SimpleNamespace(args=args)),
    ):
        made = make_backend(getattr(request, "param", CONFIG))
        made.native.take()
        yield made
