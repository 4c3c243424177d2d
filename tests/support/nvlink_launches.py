"""What the NVLink backend launches, in which order and with which arguments, without a GPU."""

from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace
from unittest import mock

import torch

from ep_comm import EPConfig
from ep_comm._native import header
from ep_comm.backends.nvlink import backend as nvlink
from ep_comm.backends.nvlink import streams as nvlink_streams
from ep_comm.backends.nvlink.backend import NVLinkBackend
from ep_comm.backends.nvlink.streams import InFlight
from ep_comm.backends.requests import DispatchRequest, PlanRequest

CURRENT, SIDE, COMM = 5, 6, 7
COPIES = 8, 9  # of dispatches, of combines
CONFIG = EPConfig(num_experts=8, hidden=512, max_tokens_per_rank=16, num_topk=2)
X = torch.zeros(10, 512, dtype=torch.bfloat16)
TOPK = torch.zeros(10, 2, dtype=torch.int64)


class Launches:
    """Stands for the native library: keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def plan(self, args, stream, side_stream, event) -> None:
        self.calls.append(("plan", type(args).from_buffer_copy(args), stream, side_stream))

    def launch(self, name, args, stream) -> None:
        self.calls.append((name, type(args).from_buffer_copy(args), stream))

    def stream_wait(self, waiting, other, event) -> None:
        self.calls.append(("wait", waiting, other))

    def event_wait(self, waiting, event) -> None:
        self.calls.append(("event", waiting, event))

    def mailbox_wait(self, args: header.MailboxArgs) -> bool:
        self.calls.append(("mailbox",))
        counts = header.Mailbox.from_address(args.mailbox)
        args.num_received = sum(counts.num_recv_tokens)
        groups = counts.num_tokens_per_expert
        args.num_expert_rows = sum(-(-rows // args.alignment) * args.alignment for rows in groups)
        return True

    def load_kernels(self) -> None:
        pass

    def plan_scratch_bytes(self, *_) -> int:
        return 16

    def buffer_offsets(self, *_) -> header.BufferOffsets:
        return header.BufferOffsets(total=4096, max_chunks=4)

    def take(self) -> list[tuple]:
        calls, self.calls = self.calls, []
        return calls


def make_backend(config: EPConfig, num_ranks: int = 2) -> NVLinkBackend:
    """By its own constructor; what that asks of CUDA is answered for a CPU."""
    mailbox = header.Mailbox()
    mailbox.num_sent_tokens[0], mailbox.num_recv_tokens[1] = 10, 7
    mailbox.num_tokens_per_expert[0] = 9
    memory = mock.Mock(
        rank=0, num_ranks=num_ranks,
        mailbox=mailbox, mailbox_address=ctypes.addressof(mailbox),
        fault_address=0, notice_address=0,
        counters=torch.zeros(3, 64, dtype=torch.int32),
        peers=lambda *_: header.Peers(num_ranks=num_ranks),
    )  # fmt: skip
    cpu = torch.device("cpu", 0)
    urgent, events = iter((COMM, *COPIES)), itertools.count(1)
    answers = {
        "Event": lambda: mock.Mock(cuda_event=next(events)),
        "Stream": lambda priority: mock.Mock(cuda_stream=next(urgent) if priority else SIDE),
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(
            multi_processor_count=132, name="a GPU that nobody measured"
        ),
    }
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(torch, "device", lambda *_: cpu),
        mock.patch.object(nvlink._native, "load", Launches),
        mock.patch.object(nvlink_streams, "in_flight", lambda _: InFlight(132)),
    ):
        return NVLinkBackend(memory, config)


def plan(backend: NVLinkBackend, capacity=None, asynchronous=False, num_sms=None, **changes):
    backend.set_num_sms(num_sms)
    request = PlanRequest(
        source=TOPK, num_topk=2, layout="expert", expert_alignment=16, has_weights=False,
        capacity=capacity, expert_capacity=None, overflow_stats=None, asynchronous=asynchronous,
    )  # fmt: skip
    return backend.plan(request._replace(**changes))


def dispatch(backend: NVLinkBackend, routing, asynchronous=False, num_sms=None, weights=None):
    backend.set_num_sms(num_sms)
    dtype = torch.bfloat16
    request = DispatchRequest(X, None, weights, dtype, dtype, asynchronous)
    return backend.dispatch(routing, request)
