"""The life of a buffer, as hypothesis likes it: any calls, in any order, on two real ranks.

The machine knows what has to come of each call: values, or which error, and whether the buffer
lives on. A call goes to both ranks at once.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ranks import run_ranks, stop_pool

from ep_comm import Buffer, EPConfig, EPError
from ep_comm.job.store import default_store

POOL = "life"
HIDDEN, MOST, EXPERTS, TOPK = 16, 6, 4, 2
TIMEOUT_S = 0.5

# ---- A rank ------------------------------------------------------------------------------------


class Life:
    """One rank's side of it: a group, its buffer, and the dispatches that have been."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank = dist.get_rank()
        self.buffer: Buffer | None = None
        self.outs: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def end(self) -> None:
        if self.buffer is not None:
            self.buffer.destroy()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def make(self) -> None:
        """On a new group: gloo ends the connections of one where a wait ran out."""
        self.end()
        self.group = dist.new_group([0, 1])
        config = EPConfig(
            num_experts=EXPERTS, hidden=HIDDEN, max_tokens_per_rank=MOST, num_topk=TOPK,
            timeout_s=TIMEOUT_S, low_latency_tokens=MOST,
        )  # fmt: skip
        self.buffer = Buffer(self.group, config)

    def inputs(self, tokens: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = tokens[self.rank]
        generator = torch.Generator().manual_seed(seed + self.rank)
        topk = torch.rand(count, EXPERTS, generator=generator).topk(TOPK).indices
        topk[torch.rand(topk.shape, generator=generator) < 0.2] = -1
        x = torch.full((count, HIDDEN), self.rank + 1.0, dtype=torch.bfloat16)
        return x, topk

    def dispatch(
        self, tokens: tuple[int, int], seed: int, layout: str, has_room: bool, **options: Any
    ) -> None:
        x, topk = self.inputs(tokens, seed)
        x.requires_grad_()
        if has_room:
            options["num_worst_tokens"] = 2 * MOST * TOPK + EXPERTS // 2 * 15
        out = self.buffer.dispatch(x, topk, layout=layout, **options)
        self.outs.append((out, x, topk))

    def cached(self, number: int) -> None:
        out, x, _ = self.outs[number]
        again = self.buffer.dispatch(x, handle=out.handle)
        assert torch.equal(again.recv_x, out.recv_x)

    def combine(self, number: int) -> None:
        out, x, topk = self.outs[number]
        back = self.buffer.combine(out.recv_x.detach(), out.handle).combined_x
        assert torch.equal(back, self.copies(out, topk) * x)

    def backward(self, number: int) -> None:
        out, x, topk = self.outs[number]
        x.grad = None
        out.recv_x.backward(torch.ones_like(out.recv_x), retain_graph=True)
        assert torch.equal(x.grad, (self.copies(out, topk) + 0 * x).to(x.dtype))

    def copies(self, out: Any, topk: torch.Tensor) -> torch.Tensor:
        """Rows that each token has become: one an expert, or one a rank."""
        if out.handle.layout == "expert":
            return (topk >= 0).sum(1, keepdim=True)
        owners = torch.where(topk >= 0, topk // (EXPERTS // 2), -1)
        return sum((owners == rank).any(1, keepdim=True).int() for rank in (0, 1))

    def low_latency(self, tokens: tuple[int, int], seed: int, split: bool) -> None:
        x, topk = self.inputs(tokens, seed)
        out = self.buffer.low_latency_dispatch(
            x, topk, MOST, EXPERTS, use_fp8=False, return_recv_hook=split
        )
        if split:
            out.hook()
        ones = torch.ones(topk.shape)
        back = self.buffer.low_latency_combine(
            out.recv_x, topk, ones, out.handle, return_recv_hook=split
        )
        if split:
            back.hook()
        assert torch.equal(back.combined_x, (topk >= 0).sum(1, keepdim=True) * x)

    def wrong(self, how: str) -> None:
        x, topk = self.inputs((3, 3), 0)
        if how == "hidden":
            x = x[:, :8].contiguous()
        if how == "expert":
            topk[1, 1] = EXPERTS
        if how == "tokens" and self.rank == 1:
            x, topk = x.repeat(3, 1), topk.repeat(3, 1)
        self.buffer.dispatch(x, topk)

    def disagree(self, seed: int) -> None:
        self.dispatch((3, 4), seed, "expert", False, expert_alignment=8 + 8 * self.rank)

    def stay_away(self, seed: int) -> None:
        """Rank 1 comes when rank 0 has given up."""
        store = default_store()
        key = f"gone/{self.group.group_name}/{self.buffer.records.num_operations}/{seed}"
        if self.rank == 1:
            store.wait([key], timedelta(seconds=20))
        try:
            self.dispatch((3, 4), seed, "expert", False)
        finally:
            store.set(key, "1")

    def recover(self) -> None:
        self.buffer.clear_mask()

    def destroy(self) -> None:
        self.buffer.destroy()


_life: Life | None = None


def call(rank: int, name: str, args: tuple) -> tuple[str, bool]:
    """Returns which error came of it, and whether the buffer is usable."""
    global _life
    if name == "begin":
        _life = Life()
        return "", False
    assert _life is not None
    error = ""
    try:
        getattr(_life, name)(*args)
    except EPError as caught:
        error = type(caught).__name__
    buffer = _life.buffer
    return error, buffer is not None and buffer.is_usable


# ---- The machine -------------------------------------------------------------------------------

_tokens = st.tuples(st.integers(0, MOST), st.integers(0, MOST))
_seeds = st.integers(0, 99)
_uses = st.sampled_from(["cached", "combine", "backward"])


class BufferLife(RuleBasedStateMachine):
    """Keeps what both ranks must be in, and asks them after each call."""

    dispatches = Bundle("dispatches")  # number, and the session that they are of

    def __init__(self) -> None:
        super().__init__()
        self.state = "none"
        self.session = (0, 0)  # buffers so far, and changes of masks
        self.count = 0
        self.calls = 0  # since the buffer was made

    def on_both(self, name: str, *args: Any) -> list[str]:
        answers = run_ranks(2, call, name, args, pool=POOL, timeout_s=60)
        self.calls = 0 if name in ("make", "destroy") else self.calls + 1
        self.usable = [usable for _, usable in answers]
        return [error for error, _ in answers]

    def expect(self, error: str, name: str, *args: Any) -> None:
        """What is not usable says so; else the call ends as expected."""
        if self.state != "usable":
            error = "EPStateError"
        assert self.on_both(name, *args) == [error, error], (name, args, self.state)

    @initialize()
    def begin(self) -> None:
        self.on_both("begin")
        self.on_both("make")
        self.state, self.session = "usable", (1, 0)

    @precondition(lambda self: self.state == "destroyed")
    @rule()
    def make(self) -> None:
        assert self.on_both("make") == ["", ""]
        self.state, self.session = "usable", (self.session[0] + 1, 0)

    @rule(
        target=dispatches, tokens=_tokens, seed=_seeds, layout=st.sampled_from(["expert", "rank"]),
        has_room=st.booleans(),
    )  # fmt: skip
    def dispatch(self, tokens: tuple[int, int], seed: int, layout: str, has_room: bool) -> Any:
        self.expect("", "dispatch", tokens, seed, layout, has_room)
        if self.state != "usable":
            return multiple()
        self.count += 1
        return self.count - 1, self.session

    @rule(which=dispatches, name=_uses)
    def use_one(self, which: tuple[int, tuple[int, int]], name: str) -> None:
        self.use(which, name)

    def use(self, which: tuple[int, tuple[int, int]], name: str) -> None:
        number, session = which
        if session == self.session:
            self.expect("", name, number)
        elif name == "backward" or self.state != "usable" or session[0] == self.session[0]:
            assert self.on_both(name, number) == ["EPStateError"] * 2  # it is over
        else:
            assert self.on_both(name, number) == ["EPArgumentError"] * 2  # another buffer's

    @rule(which=consumes(dispatches))
    def forget(self, which: tuple[int, tuple[int, int]]) -> None:
        """Handles go in any order."""

    @rule(tokens=_tokens, seed=_seeds, split=st.booleans())
    def low_latency(self, tokens: tuple[int, int], seed: int, split: bool) -> None:
        self.expect("", "low_latency", tokens, seed, split)

    @rule(how=st.sampled_from(["hidden", "expert", "tokens"]))
    def wrong(self, how: str) -> None:
        errors = {"hidden": "EPArgumentError", "expert": "EPRoutingError"}
        self.expect(errors.get(how, "EPTooManyTokensError"), "wrong", how)

    @precondition(lambda self: self.state == "usable")
    @rule(seed=_seeds)
    def disagree(self, seed: int) -> None:
        assert self.on_both("disagree", seed) == ["EPMismatchError"] * 2
        self.state = "failed"

    @precondition(lambda self: self.state == "usable")
    @rule(seed=_seeds)
    def stay_away(self, seed: int) -> None:
        first, second = self.on_both("stay_away", seed)
        assert first == "EPTimeoutError" and second in ("EPTimeoutError", "EPLostRankError")
        self.state = "failed"

    @rule(which=dispatches, name=_uses)
    def recover(self, which: tuple[int, tuple[int, int]], name: str) -> None:
        """Masks change: dispatches of before are over."""
        if self.state == "destroyed":
            return
        assert self.on_both("recover") == ["", ""]
        self.state, self.session = "usable", (self.session[0], self.session[1] + 1)
        self.use(which, name)

    @precondition(lambda self: self.calls > 5)  # a short life has seen little
    @rule()
    def destroy(self) -> None:
        assert self.on_both("destroy") == ["", ""]
        self.state = "destroyed"

    @invariant()
    def both_know_their_state(self) -> None:
        if self.state != "none":
            assert self.usable == [self.state == "usable"] * 2

    def teardown(self) -> None:
        with contextlib.suppress(Exception):  # a failed call has stopped the ranks
            self.on_both("end")


def test_any_calls_in_any_order():
    quiet = settings(
        max_examples=8,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,  # the same in every run: one that fails is not lost
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],  # to shrink a case that fails takes minutes
    )
    try:
        run_state_machine_as_test(BufferLife, settings=quiet)
    finally:
        stop_pool(POOL)
